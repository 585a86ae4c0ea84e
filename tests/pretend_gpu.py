"""A GPU that is not there: a device "gpu" of the CPU build of torch, on which a whole script runs.

A tensor on it holds another tensor: on the CPU, with the true numbers, or, where that has more than `limit` numbers or
comes from one that has, on the meta device, without numbers. So small runs give the CPU's results bit for bit, and a
model of twelve billion weights takes no memory. What it shows: operations that mix devices or dtypes, which raise as on
a true GPU; the peak of memory. What it does not: rounding, speed, kernels that a GPU lacks.
"""

import contextlib
import math
import weakref
from unittest import mock

import bench

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

aten = torch.ops.aten


class Module(backend_registration._DummyBackendModule):
    """torch.gpu, as far as checkpointing asks for it."""

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("gpu", Module())


class Memory:
    """Bytes of all tensors on the device now, and their peak; limit: numbers of the largest tensor with true values."""

    now = peak = 0
    limit, live = math.inf, {}

    def keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage._cdata)

    def free(self, key):
        self.now -= self.live.pop(key)


memory, shapes = Memory(), bench.Meter()


class OnGPU(torch.Tensor):
    """A tensor on the pretend GPU; held: its numbers on the CPU, or its shape on the meta device."""

    @staticmethod
    def __new__(cls, held):
        place = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device="gpu:0")
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **place)
        tensor.held = held
        memory.keep(held)
        return tensor

    def __repr__(self):
        return f"OnGPU({self.held})"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.item() if spec else repr(self), spec)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def meta(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def check_devices(func, tensors):
    """Raise where a true GPU would: only a number (no dimension) may be on another device than the rest."""
    own, *indices = tensors if "aten.index" in str(func) else [None]
    if indices and own.device.type == "gpu":
        return  # indices may be on the CPU
    if len({t.device.type for t in tensors if t.dim()}) > 1:
        raise RuntimeError(f"{func}: tensors on the CPU and on the GPU, {[(t.device.type, *t.shape) for t in tensors]}")


def run(func, args, kwargs):
    """Run an operation that has a tensor on the GPU, or makes one."""
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    to = kwargs.get("device")
    to = torch.device(to).type if to is not None else None
    copies = func in (aten._to_copy.default, aten.copy_.default)
    if not copies:
        check_devices(func, tensors)
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: a generator on the CPU for numbers on the GPU")
    real = not any(isinstance(t, OnGPU) and t.held.is_meta for t in tensors)
    if func is aten._local_scalar_dense.default and not real:
        return 0.5
    if func is aten.copy_.default and not isinstance(args[0], OnGPU):
        return args[0].copy_(off(args[1]))
    if func is aten._to_copy.default and to == "cpu":
        return func(off(args[0]), **kwargs)
    numbers = max((t.numel() for t in tensors), default=0)
    if not tensors:  # a factory
        numbers = math.prod(args[0]) if isinstance(args[0], (list, tuple, torch.Size)) else 0
    real = real and numbers <= memory.limit

    def put(value):
        if isinstance(value, torch.device):
            return torch.device("cpu" if real else "meta") if value.type == "gpu" else value
        held = value.held if isinstance(value, OnGPU) else value
        return held if real or not isinstance(held, torch.Tensor) or held.is_meta else meta(held)

    if func._schema.is_mutable and not real:
        for t in tensors[:1]:
            if isinstance(t, OnGPU) and not t.held.is_meta:
                t.held = meta(t.held)
                memory.keep(t.held)
    args, kwargs = tree_map(put, args), tree_map(put, kwargs)
    out = func(*args, **kwargs) if real else shapes.run(func, args, kwargs)[0]
    own = {id(t.held): t for t in tensors if isinstance(t, OnGPU)}  # what was changed in place
    return tree_map(lambda t: own[id(t)] if id(t) in own else OnGPU(t) if isinstance(t, torch.Tensor) else t, out)


def off(tensor):
    """What a copy to the CPU gives: the true numbers, or any; where they are many, memory that nobody has touched."""
    held = tensor.held if isinstance(tensor, OnGPU) else tensor
    if not held.is_meta:
        return held
    return torch.empty(held.shape, dtype=held.dtype) if held.numel() > 1e6 else torch.rand(held.shape).to(held.dtype)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention: of true numbers as on the CPU, of others the kernel that CUDA would take."""
    tensors, options = [query, key, value, attn_mask], dict(scale=scale, enable_gqa=enable_gqa)
    if not isinstance(query, OnGPU):
        return on_cpu(*tensors, dropout_p, is_causal, **options)
    check_devices("scaled_dot_product_attention", [t for t in tensors if t is not None])
    if query.held.is_meta:
        return bench.attention(*tensors, dropout_p, is_causal, **options)
    if torch.is_grad_enabled() and query.requires_grad:
        return aten._scaled_dot_product_flash_attention_for_cpu(*tensors[:3], dropout_p, is_causal, scale=scale)[0]
    held = [t if t is None else t.held for t in tensors]
    return OnGPU(on_cpu(*held, dropout_p, is_causal, **options))


on_cpu = torch.nn.functional.scaled_dot_product_attention


class Factories(TorchDispatchMode):
    """Runs what makes a tensor on the device out of none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        place = (kwargs or {}).get("device")
        on_gpu = place is not None and torch.device(place).type == "gpu"
        return run(func, args, kwargs) if on_gpu else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def card(limit=math.inf):
    """Inside, the device is there; gives its memory. limit: the largest tensor with true numbers."""
    memory.limit, memory.peak = limit, memory.now
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="gpu") makes it on the CPU and copies it
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention), Factories():
        yield memory
