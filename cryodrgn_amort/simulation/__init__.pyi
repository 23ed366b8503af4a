from .imaging import Imaging as Imaging, load_imaging as load_imaging
from .simulator import Simulation as Simulation, simulate as simulate
from .truth import Known as Known, Truth as Truth, load_known as load_known
