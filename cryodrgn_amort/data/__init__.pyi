from .batch_loader import BatchLoader as BatchLoader
from .batches import Batches as Batches, Loaded as Loaded, read_ahead as read_ahead
from .inputs import EncoderInput as EncoderInput, Noise as Noise, Twin as Twin
from .noise import (
    Agreement as Agreement,
    NoiseModel as NoiseModel,
    Shells as Shells,
    optics_groups as optics_groups,
)
from .particle_source import ParticleSource as ParticleSource, load_particles as load_particles
from .particles import Batch as Batch, Particles as Particles, odd_images as odd_images
from .poses_and_ctf import load_ctf as load_ctf, load_poses as load_poses
from .transform_specs import TRANSFORMS as TRANSFORMS, TransformSpec as TransformSpec
from .transforms import (
    ASTIGMATISM_ANGLE as ASTIGMATISM_ANGLE,
    Roll as Roll,
    Rotation as Rotation,
    Transform as Transform,
    sheared_turn as sheared_turn,
)
