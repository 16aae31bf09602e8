"""ldm_minimal: latent diffusion, built and trained in an afternoon. Everything stands in `ldm.py`; this is its face."""

from . import ldm
from .ldm import *  # noqa: F403

__all__ = ldm.__all__
__version__ = "0.1.0"
