from .hookspecs import hookimpl as hookimpl
from .manager import Plugins as Plugins, load_plugins as load_plugins
