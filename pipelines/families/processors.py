"""Attention processors of accelerated layers: copies of diffusers' own, with another attention function.

Most of diffusers' processors project, normalise and rotate, call `dispatch_attention_fn`, and project back.
An accelerated layer gets an instance of a subclass whose `__call__` is the processor's own code over globals
in which that one name is ours. diffusers' modules and classes stay as they are, and all that a processor does
besides attention (LoRA, fused projections, quantized weights) is done by its own code.
"""

from __future__ import annotations

import types
from functools import cache, partial
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch

from dit_accel.attention import transformer_call
from dit_accel.attention.call import AttentionCall
from dit_accel.errors import UnavailableError

DISPATCH = "dispatch_attention_fn"

_numbers = count()
_numbered: WeakValueDictionary[int, Accelerated] = WeakValueDictionary()


class Accelerated:
    """What accelerated processors have in common: the call in progress says what their layer computes.

    Attributes:
        original: the processor that it stands in for.
        owner: who begins the calls, see `dit_accel.attention.transformer_call`; None once it was
            replaced: where something puts it back, it does what the original does.
        layer: the name of its layer there.
        knows_mask: whether layouts say what the model's own mask does, so that one may come with a call.
    """

    original: Any
    owner: Any
    layer: str
    knows_mask = False
    _traced = False  # whether compiled code has called it
    _number: torch.Tensor  # by which compiled code knows it; a tensor, so that one graph serves all layers

    def dense(self, call: AttentionCall, attn_mask: torch.Tensor | None) -> torch.Tensor:
        """The model's own attention of a call, (B, H, S, D) like its q, k and v."""
        raise NotImplementedError

    def dispatched(self, call: AttentionCall, attn_mask: torch.Tensor | None) -> torch.Tensor:
        """The same by the function that the original calls, with the backend that was set for it."""
        dispatch = type(self.original).__call__.__globals__[DISPATCH]
        whole = call.layout is not None  # all tokens, however many processes share them
        parallel = None if whole else self._parallel_config
        options = {"backend": self._attention_backend, "parallel_config": parallel}
        qkv = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        return dispatch(*qkv, attn_mask=attn_mask, scale=call.scale, **options).transpose(1, 2)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """What the layer computes in this call, (B, S, H, D) like q, k and v; `attn_mask` is for `dense`."""
        device = q.device.type
        if torch.is_autocast_enabled(device):  # as PyTorch's attention; norms give q and k in float32
            q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if torch.compiler.is_compiling() and not differentiable:
            mask = attn_mask if isinstance(attn_mask, torch.Tensor) else None  # an operation takes no others
            return _attend_in_graph(q, k, v, mask, self._number, scale)
        return self.attend_now(q, k, v, attn_mask, scale)

    @torch.compiler.disable
    def attend_now(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        scale: float | None,
        in_graph: bool = False,
    ) -> torch.Tensor:
        """The same, outside of compiled code, or `in_graph`, as an operation of it."""
        if self.owner is None:
            qkv = (x.transpose(1, 2) for x in (q, k, v))
            call = AttentionCall(*qkv, layout=None, dense=self.dense, scale=scale)
            return self.dense(call, attn_mask=attn_mask).transpose(1, 2)
        call = transformer_call.current(self.owner)
        if call is None:
            raise RuntimeError(
                "an accelerated attention layer was called outside its transformer's call; call the "
                "transformer itself (not its `forward` or its blocks), or `dit_accel.disable` it first"
            )
        shards = call.shards_of(self.layer)
        balance = call.balances.get(self.layer)
        if shards is not None:
            q, k, v = shards.to_heads(q, k, v, call.layouts[self.layer], balance)
            call.count_exchange(self.layer, q)
        qkv = tuple(x.transpose(1, 2) for x in (q, k, v))
        masked = attn_mask is not None and call.text_valid is None and not self.knows_mask
        if masked and (shards is not None or not call.keeps_own(self.layer, *qkv[:2])):
            raise ValueError(
                "an `attention_mask` is not supported in accelerated layers; make this layer or step dense"
            )
        own = self.dense_in_graph if in_graph else self.dense
        dense = partial(own, attn_mask=attn_mask) if shards is None else self._dense_of_all
        out = call.attend(self.layer, *qkv, dense=dense, scale=scale).transpose(1, 2)
        return out if shards is None else shards.to_tokens(out, call.layouts[self.layer], balance)

    def dense_in_graph(self, call: AttentionCall, attn_mask: torch.Tensor | None) -> torch.Tensor:
        """`dense` in an operation of compiled code, which is given no mask but one of a tensor."""
        return self.dense(call, attn_mask)

    def _dense_of_all(self, call: AttentionCall) -> torch.Tensor:
        """`dense`, of the tokens of all processes, whose mask none of them has."""
        hidden = call.hidden_keys()
        return self.dense(call, attn_mask=None if hidden is None else ~hidden[:, None, None])

    def retire(self) -> None:
        """Its owner is done with it.

        Where compiled code read its number the original keeps that: PyTorch reads all tensors of a graph once
        more to say why it does not fit, and fails where one is missing.
        """
        self.owner = None
        if self._traced:
            self.original._number = self._number

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        number = next(_numbers)
        _numbered[number] = self
        with torch.inference_mode(False):  # what stays must be usable under autograd later
            self._number = torch.tensor(number, dtype=torch.int64, device="cpu")

    # `set_attention_backend` and context parallelism write these on whatever processor a layer has.

    @property
    def _attention_backend(self) -> Any:
        return getattr(self.original, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.original._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.original._parallel_config = value


def install(module: Any, processor: Any) -> None:
    """Gives an attention module its processor; Mochi's modules have no `set_processor`."""
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def accelerated(original: Any, owner: Any, layer: str, kind: type[Accelerated] | None = None) -> Accelerated:
    """A processor that stands in for `original`; of `kind`, or a copy of the original's own code where None.

    Raises:
        UnavailableError: a processor that does not call diffusers' `dispatch_attention_fn`.
    """
    processor = _stand_in(original, kind)
    processor.__setstate__({"owner": owner, "layer": layer})
    return processor


def _stand_in(original: Any, kind: type[Accelerated] | None) -> Accelerated:
    """Made without `__init__`: loaders call the class without arguments, and then get a stock processor."""
    made = _class_like(type(original), kind)
    processor = object.__new__(made)
    processor.original = original
    return processor


@cache
def _class_like(original: type, kind: type[Accelerated] | None) -> type[Accelerated]:
    if kind is None or issubclass(kind, Reused):
        reason = not_reusable(original)
        if reason is not None:
            raise UnavailableError(f"the attention processor {original.__name__} {reason}")
        bases, body = (kind or Reused, original), {"__call__": _with_dispatch(original.__call__)}
    else:
        bases, body = (kind, original), {}

    def stock(cls: type, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    def reduce(self: Accelerated, protocol: int) -> tuple:
        return _stand_in, (self.original, kind), {"owner": self.owner, "layer": self.layer}

    body |= {"__new__": stock, "__reduce_ex__": reduce, "__module__": __name__}
    return type(f"Accelerated{original.__name__}", bases, body)


def not_reusable(processor: type) -> str | None:
    """Why the code of a processor class cannot be reused, or None."""
    code = getattr(processor.__call__, "__code__", None)
    if code is None or DISPATCH not in code.co_names:
        return f"does not call diffusers' `{DISPATCH}`, where accelerated attention takes over"
    return None


def _with_dispatch(function: Any) -> types.FunctionType:
    """A function's own code over globals in which `dispatch_attention_fn` is ours.

    Ours must know by which processor it was called: where the code passes its `_attention_backend`, the copy
    passes the processor itself.
    """
    code = function.__code__
    code = code.replace(co_names=tuple("itself" if n == "_attention_backend" else n for n in code.co_names))
    names = {**function.__globals__, DISPATCH: _dispatch}
    copy = types.FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class Reused(Accelerated):
    """Over the original's own code."""

    @property
    def itself(self) -> Reused:
        return self

    def dense(self, call: AttentionCall, attn_mask: torch.Tensor | None) -> torch.Tensor:
        return self.dispatched(call, attn_mask)


def _dispatch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Reused | None = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """Stands where an accelerated processor calls diffusers' `dispatch_attention_fn`."""
    asked = {"dropout_p": dropout_p, "is_causal": is_causal, "enable_gqa": enable_gqa}
    asked |= {"attention_kwargs": attention_kwargs}
    for name, value_ in asked.items():
        if value_:
            raise UnavailableError(
                f"this layer attends with `{name}={value_!r}`, which accelerated layers cannot; make it dense"
            )
    return backend.attend(query, key, value, attn_mask, scale)


_OPTIONS: dict[str, Any] = {"mutates_args": ()}
if hasattr(torch._C.Tag, "cudagraph_unsafe"):  # what it does depends on the step
    _OPTIONS["tags"] = (torch._C.Tag.cudagraph_unsafe,)


@torch.library.custom_op("dit_accel::layer_attention", **_OPTIONS)
def _attend_in_graph(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    number: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """An accelerated layer in compiled code: what it computes may change from call to call, the graph not."""
    processor = _numbered[int(number)]
    processor._traced = True
    return processor.attend_now(q, k, v, attn_mask, scale, in_graph=True).contiguous()


@_attend_in_graph.register_fake
def _(q, k, v, attn_mask, number, scale):
    return q.new_empty(q.shape)
