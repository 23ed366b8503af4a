"""A GPU that is none: its tensors say that they are there, and are computed on the CPU.

Below autograd, so that whole commands run, their results can be compared with a plain run's, and
what CUDA forbids fails: tensors of two devices in one operation, the values of a tensor of the
device without a copy, work on the device in threads that only read. What costs time is counted:

- launches: operations that would start a kernel, views and allocations not among them;
- syncs: operations for which the processor would wait, each with the line that asked for it. Copies
  to the device with ``non_blocking`` are none: on CUDA they come from pinned memory.

``trace`` tells whether two steps do the very same work, which is what a CUDA graph replays.
"""

import collections
import contextlib
import os
import sys

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this PyTorch can have a device that Python makes up: from 2.10."""
TYPE = "gpu"
if AVAILABLE:
    backend_registration._setup_privateuseone_for_python_backend(TYPE)
    DEVICE = torch.device(f"{TYPE}:0")

_FREE_OF_CHARGE = {
    "_reshape_alias", "_unsafe_view", "alias", "detach", "empty", "empty_like", "empty_strided",
    "lift_fresh", "new_empty", "new_empty_strided",
}  # fmt: skip
_ASKS = {
    "_coalesce", "_local_scalar_dense", "_unique2", "bincount", "equal", "masked_select", "nonzero",
    "unique_dim",
}  # fmt: skip
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}
_MAY_MIX = {*_INDEXES, "_to_copy", "copy_"}


class OnGpu(torch.Tensor):
    """A tensor of the device; ``elem`` holds its values."""

    @staticmethod
    def __new__(cls, elem):
        return torch.Tensor._make_wrapper_subclass(
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(),
            dtype=elem.dtype, device=DEVICE,
        )  # fmt: skip

    def __init__(self, elem):
        self.elem = elem

    def __repr__(self, **_):
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.detach().cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the GPU, in a thread that should only read")


class EmulatedGpu(TorchDispatchMode):
    """What runs within is on the device, if it asks for it; counts launches and syncs."""

    def __init__(self):
        super().__init__()
        self.launches, self.replays = 0, 0
        self.sent = 0  # in bytes
        self.syncs = collections.Counter()
        self.trace = []
        self.recorded = None
        """Operations of the graph that is being recorded, if any is."""
        self._written = []

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device=) comes through here
        return super().__enter__()

    def __exit__(self, *exc):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*exc)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, to = func._schema.name.split("::")[1], kwargs.get("device")
        leaves = tree_leaves((args, kwargs))
        ours = any(isinstance(t, OnGpu) for t in leaves)
        wanted = to is not None and torch.device(to).type == TYPE
        if not ours and not wanted:
            return func(*args, **kwargs)
        self._check(name, args, [t for t in leaves if isinstance(t, torch.Tensor)])
        back = name == "_to_copy" and ours and to is not None and not wanted
        self._count_syncs(name, args, kwargs, back=back, arrives=name == "_to_copy" and not ours)
        plain_args, plain = tree_map(_plain, (args, kwargs))
        if to is not None:
            plain["device"] = "cpu"
        if self.recorded is not None:
            self._keep(func, args, kwargs)
        found = func(*plain_args, **plain)
        if self.recorded is not None and not back:
            self.recorded.append((func, plain_args, plain, found))
        if back:
            return found
        return self._wrapped(func, name, found, args, kwargs, leaves)

    def _check(self, name, args, tensors):
        """Fail where CUDA would: scalars of the CPU, and positions there, may meet its tensors."""
        if name in _INDEXES:
            values = args[2] if name != "index" else None
            if not isinstance(args[0], OnGpu) or (
                values is not None and values.dim() and not isinstance(values, OnGpu)
            ):
                raise RuntimeError(f"{name} at {_site()}: tensors on {DEVICE} and cpu")
            return
        there = [isinstance(t, OnGpu) for t in tensors]
        here = any(t.dim() for t, is_there in zip(tensors, there, strict=True) if not is_there)
        if name not in _MAY_MIX and any(there) and here:
            raise RuntimeError(f"{name} at {_site()}: tensors on {DEVICE} and cpu")

    def _count_syncs(self, name, args, kwargs, *, back, arrives):
        kinds = [name] if name in _ASKS else []
        if name in _INDEXES:
            kinds += [
                "mask" if at.dtype == torch.bool else "position from the CPU"
                for at in args[1]
                if at is not None and (at.dtype == torch.bool or not isinstance(at, OnGpu))
            ]
        if back:
            kinds.append("to the CPU")
        if arrives:
            self.sent += args[0].numel() * args[0].element_size()
            if not kwargs.get("non_blocking"):
                kinds.append("to the GPU")
        if name == "copy_" and isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu):
            kinds += [] if kwargs.get("non_blocking", any(args[2:])) else ["copied across"]
        if self.recorded is not None and (kinds or arrives):
            raise RuntimeError(f"{name} at {_site()}: waits, while a graph is recorded")
        for kind in kinds:
            self.syncs[f"{kind} at {_site()}"] += 1

    def _keep(self, func, args, kwargs):
        """Keep what an operation is about to change: what is recorded must not be done."""
        for tensor in tree_leaves(_written(func, args, kwargs)):
            if isinstance(tensor, OnGpu):
                self._written.append((tensor.elem, tensor.elem.clone()))

    def undo(self):
        """Undo what operations have changed while they were recorded."""
        while self._written:
            elem, before = self._written.pop()
            elem.copy_(before)

    def _wrapped(self, func, name, found, args, kwargs, leaves):
        schema, written = func._schema, _written(func, args, kwargs)
        views = any(r.alias_info for r in schema.returns)
        if name not in _FREE_OF_CHARGE and (written or not views):
            self.launches += 1
            self.trace.append((name, *map(_described, leaves)))
        if any(r.alias_info and r.alias_info.is_write for r in schema.returns):
            return written[0] if len(written) == 1 else tuple(written)
        return tree_map(lambda t: OnGpu(t) if isinstance(t, torch.Tensor) else t, found)


class EmulatedGraph:
    """What ``core.Graph`` is on a GPU: operations that are recorded, then done on the same memory.

    Numbers of Python are what they were, and memory that somebody else has got is theirs.
    """

    gpu = None

    def __init__(self, generators):
        self._operations, self._generators = [], [torch.default_generator, *generators]

    @staticmethod
    def possible(device):
        return device.type == TYPE

    @contextlib.contextmanager
    def recording(self):
        states = [generator.get_state() for generator in self._generators]
        self.gpu.recorded = self._operations
        try:
            yield
        finally:
            self.gpu.recorded = None
            self.gpu.undo()
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)

    def replay(self):
        self.gpu.launches += 1
        self.gpu.replays += 1
        for func, args, kwargs, known in self._operations:
            if any(a.alias_info and not a.alias_info.is_write for a in func._schema.returns):
                continue  # a view: of what has changed
            found = func(*args, **kwargs)
            for old, new in zip(tree_leaves(known), tree_leaves(found), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


def _written(func, args, kwargs):
    arguments = func._schema.arguments
    given = [*zip(arguments, args, strict=False)]
    given += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
    return [v for a, v in given if a.alias_info and a.alias_info.is_write]


def _plain(leaf):
    return leaf.elem if isinstance(leaf, OnGpu) else leaf


def _described(leaf):
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape)
    return leaf if isinstance(leaf, int | float) else None


def _site():
    """Return the line of the package, or of the host, that is at work."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "cryodrgn" in path and "site-packages/torch" not in path:
            return f"{os.path.basename(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"
