"""Pure functions of arrays that measure, and the catalogue of all measures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
