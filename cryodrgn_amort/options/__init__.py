"""What may be asked for: one dataclass per command, one field per flag."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
