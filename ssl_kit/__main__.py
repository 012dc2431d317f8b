"""`python -m ssl_kit VERB ...`, also what torchrun wants: `torchrun -m ssl_kit -- pretrain ...`."""

from ssl_kit.cli import run

if __name__ == "__main__":
    run()
