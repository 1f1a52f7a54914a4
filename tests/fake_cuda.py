"""A CUDA card that is not there: tensors that say `cuda:0` and have their numbers on the CPU

Each operation is first tried by PyTorch's FakeTensorMode on tensors of the same devices, dtypes and
shapes, which raises what a card would: two devices in one operation, dtypes that do not go
together. Then it is done on the CPU. Autocast, GradScaler, fused AdamW and the nodes of autograd
are PyTorch's own, as on a card.
Not imitated: a card's rounding, memory and speed, its streams, other threads (overlap_reward),
several cards, cuDNN, fused attention, torch.compile.
"""

from contextlib import ExitStack, contextmanager
from functools import cache
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

CUDA = torch.device('cuda', 0)
ON_CPU = torch.autograd._engine_run_backward
FAKE = FakeTensorMode()
FUSED = (torch.ops.aten._fused_adamw_.default,)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default)


class Card(torch.Tensor):
    "A tensor on the card; `value` holds its numbers."

    @staticmethod
    def __new__(cls, value):
        options = dict(dtype=value.dtype, layout=value.layout, device=CUDA)
        options |= dict(strides=value.stride(), storage_offset=value.storage_offset())
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, **options)

    def __init__(self, value):
        self.value = value

    def __reduce_ex__(self, protocol):  # as of a file loaded with map_location='cpu'
        return self.value.__reduce_ex__(protocol)

    def tolist(self):  # PyTorch's own refuses subclasses
        return self.value.tolist()

    def untyped_storage(self):  # by which safetensors knows what is shared
        return self.value.untyped_storage()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):  # exchanges what is inside
        torch.Tensor.data.__set__(self, new)
        self.value = new.value

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Factories(TorchDispatchMode):
    "Catches what has nothing on the card among its arguments, but asks for the card."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def outline(x):
    "A tensor without its numbers; what is no tensor stays."
    tensor = isinstance(x, torch.Tensor)
    return (tuple(x.shape), x.stride(), x.dtype, x.device) if tensor else x


def fake(x):
    "The tensor of an outline, for FakeTensorMode."
    outlined = isinstance(x, tuple)
    return torch.empty_strided(*x[:2], dtype=x[2], device=x[3]) if outlined else x


def on_cpu(x):
    if isinstance(x, torch.device):
        return torch.device('cpu')
    return x.value if isinstance(x, Card) else x


def placed(x, tried):
    "A result where its fake is; on the card when there is none."
    if not torch.is_tensor(x) or getattr(tried, 'device', CUDA) != CUDA:
        return x
    return Card(x)


@cache  # because trying takes much longer than doing
def try_out(func, tree, *leaves):  # fake results; None where these depend on the numbers
    "Raises what a card would raise."
    with FAKE:
        args, kwargs = tree_unflatten(map(fake, leaves), tree)
        # what FakeTensorMode lets pass
        if func in INDEXING and args[0].device != CUDA:
            raise RuntimeError(f'{func}: indices on a card, values on the CPU')
        if func in FUSED and len({x.device for tensors in args for x in tensors}) > 1:
            raise RuntimeError(f'{func}: lists on two different devices')
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return None


def dispatch(func, args, kwargs):
    "One operation: tried, done on the CPU, and its results put where they would be."
    leaves, tree = tree_flatten((args, kwargs))
    devices = {x.type for x in leaves if isinstance(x, torch.device)}
    if 'cuda' not in devices and not any(isinstance(x, Card) for x in leaves):
        return func(*args, **kwargs)
    tried = try_out(func, tree, *map(outline, leaves))
    plain_args, plain_kwargs = tree_unflatten([on_cpu(x) for x in leaves], tree)
    result = func(*plain_args, **plain_kwargs)
    if any(a.alias_info and a.alias_info.is_write for a in func._schema.returns):
        return kwargs.get('out', args[0])  # in place
    if isinstance(result, tuple | list):
        return type(result)(map(placed, result, tried or [None] * len(result)))
    return placed(result, tried)


def walk_back(roots, gradients, *_, **__):
    """Backward, because PyTorch's engine wants the streams of a card: each node is called here, the
    latest first, and what has none after it, and takes the gradient of a weight, at the end."""
    arrived, stack = {}, [root.grad_fn for root in roots]
    while stack:
        node = stack.pop()
        if node not in arrived:
            arrived[node] = {}
            stack += [after for after, _ in node.next_functions if after]
    for root, gradient in zip(roots, gradients):
        arrived[root.grad_fn][root.output_nr] = gradient
    for node in sorted(arrived, key=lambda n: (not n.next_functions, -n._sequence_nr())):
        found = arrived.pop(node)
        out = node(*(found.get(i) for i in range(len(node._input_metadata))))
        for (after, i), gradient in zip(node.next_functions, out if type(out) is tuple else [out]):
            if after and gradient is not None:
                wanted = after._input_metadata[i]
                if gradient.device != wanted.device:
                    raise RuntimeError(f'{node.name()}: a gradient on {gradient.device}')
                gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                arrived[after][i] = arrived[after].get(i, 0) + gradient


def backward(roots, *args, **options):
    "On the card, or not."
    if not isinstance(roots[0], Card):
        return ON_CPU(roots, *args, **options)
    # the number of a walk, by which gradient checkpointing computes a block again only once
    with torch.no_grad(), patch('torch._C._current_graph_task_id', lambda: 0):
        return walk_back(roots, *args)


@contextmanager
def card(bfloat16: bool = True):  # does the card have it?
    "While entered there is a card. Afterwards all is as it was."
    changes = {
        'cuda._lazy_init': lambda: None,
        'cuda.is_available': lambda: True,
        'accelerator.is_available': lambda: True,
        'cuda.is_bf16_supported': lambda *_, **__: bfloat16,
        'cuda.is_current_stream_capturing': lambda: False,
        'autograd._engine_run_backward': backward,
        '__future__.get_overwrite_module_params_on_conversion': lambda: True,
    }
    with ExitStack() as stack:
        for name, change in changes.items():
            stack.enter_context(patch(f'torch.{name}', change))
        lifted = torch._C._only_lift_cpu_tensors()
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        precision = torch.get_float32_matmul_precision()
        stack.callback(torch.set_float32_matmul_precision, precision)
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(Factories())
        torch._C._ensureCUDADeviceGuardSet()  # as any fake tensor on cuda does
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device='cuda') comes by then
        yield
