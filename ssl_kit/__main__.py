"""`python -m ssl_kit VERB ...`, also what torchrun wants: `torchrun -m ssl_kit -- pretrain ...`."""

import sys

from ssl_kit.cli import main

sys.exit(main())
