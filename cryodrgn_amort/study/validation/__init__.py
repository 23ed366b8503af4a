"""Is it in the particles? A verdict on a user's own run, without any truth."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
