"""Views: what a method sees of an image. A policy as numbers, one stateless sampler, two executors that agree."""

import sys

from ssl_kit.core.settings import VerbPackage

sys.modules[__name__].__class__ = VerbPackage
