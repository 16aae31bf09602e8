"""ldm_minimal: latent diffusion, built and trained in an afternoon. The method is in `ldm.py`."""

from . import ldm
from .ldm import *  # noqa: F403

__all__ = ldm.__all__
__version__ = "0.2.0"
