"""What the tests share: seeds, the founding document's programs, the variants of the models, and shapes of results.

Nothing of triglot is imported here before a fixture runs, so that jaxtyping's hook comes first.
"""

import os
import re
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import jaxtyping
import pytest
import torch

from tests.foreign import family, marian

__all__ = ["family", "marian"]

WARNS_OF_ITSELF = [
    pytest.mark.filterwarnings(f"ignore:{what}")
    for what in (
        "The .grad attribute of a Tensor that is not a leaf:UserWarning",
        ".*torch.jit:DeprecationWarning",
        ".torch._prims_common.check. is deprecated:FutureWarning",
        "TensorFloat32:UserWarning",  # fp32 is to be fp32
    )
]
"""Marks of tests in which torch's compiler runs, which warns of what it does itself."""

HAS_COMPILER = shutil.which("g++") is not None
KERNELS = [False, True] if HAS_COMPILER else [False]
"""Ways to decode: by kernels, or without."""
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler here")

VARIANTS: dict[str, dict[str, Any]] = {
    "document": {},
    "pre": {"norm_order": "pre"},
    "pre-without-final-norm": {"norm_order": "pre", "final_norm": False},
    "post-rms-learned-gelu": {"norm": "rms", "positions": "learned", "activation": "gelu"},
    "pre-learned-gelu-tied": {
        "norm_order": "pre", "positions": "learned", "activation": "gelu", "tie_embeddings": True
    },
    "post-rotary-swiglu": {"positions": "rotary", "activation": "swiglu"},
    "pre-rms-rotary-swiglu-grouped": {
        "norm_order": "pre", "norm": "rms", "positions": "rotary", "activation": "swiglu", "num_kv_heads": 2,
        "bias": False, "scale_embeddings": False, "norm_eps": 1e-6,
    },
    "one-kv-head-tied": {"num_kv_heads": 1, "tie_embeddings": True},
    "experts": {"activation": "gelu", "experts": {"num_experts": 13, "d_ff": 11, "router_bias": True}},
    "every-2nd-experts-top-1": {"experts": {"num_experts": 3, "top_k": 1, "every": 2}},
    "pre-rms-rotary-experts-top-3": {
        "norm_order": "pre", "norm": "rms", "positions": "rotary", "activation": "swiglu", "num_kv_heads": 2,
        "bias": False, "experts": {"num_experts": 5, "top_k": 3},
    },
    "pre-rms-sigmoid-shared-experts": {
        "norm_order": "pre", "norm": "rms", "activation": "swiglu", "bias": False,
        "experts": {"num_experts": 5, "top_k": 2, "router": "sigmoid", "shared": 1, "d_ff": 11},
    },
    "t5": {
        "norm_order": "pre", "norm": "rms", "positions": "relative", "relative_buckets": 8, "relative_distance": 6,
        "activation": "geglu_tanh", "bias": False, "output_bias": False, "head_dim": 7, "scale_attention": False,
        "scale_output": True, "scale_embeddings": False, "tie_embeddings": True,
    },
    "qwen3": {
        "norm_order": "pre", "norm": "rms", "positions": "rotary", "activation": "swiglu", "num_kv_heads": 2,
        "bias": False, "qkv_bias": True, "head_dim": 8, "qk_norm": "head", "scale_embeddings": False,
        "rope_scaling": {"kind": "llama3", "factor": 4.0, "original_max_position": 11},
    },
    "post-rotary-embedding-norm-norms-of-width": {
        "positions": "rotary", "embedding_norm": True, "qk_norm": "width", "activation": "silu", "num_kv_heads": 2,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position": 11},
    },
    "bart-experts": {
        "positions": "learned", "embedding_norm": True, "activation": "gelu_tanh", "scale_embeddings": False,
        "experts": {"num_experts": 5, "top_k": 2},
    },
    "experts-with-capacity": {"experts": {"num_experts": 5, "top_k": 2, "capacity_factor": 0.5}},
}  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """For what the shape types would refuse before our own code can, and for the compiler, which cannot trace them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def compiler(without_shape_checks: None) -> Iterator[None]:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler, and there is none here")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `need_weights` PyTorch's kernel is used, which short sequences on a processor would not pay for."""
    monkeypatch.setattr("triglot.layers.attention.fused_kernel_pays", lambda query, key: True)


@pytest.fixture(params=VARIANTS)
def options(request: pytest.FixtureRequest) -> Any:
    """The BlockOptions of each variant in turn."""
    from triglot.config import BlockOptions
    from triglot.recipe import from_dict

    return from_dict(BlockOptions, VARIANTS[request.param])


@pytest.fixture(scope="session")
def check_fields() -> Callable[[Any], None]:
    """Checks a named tuple's fields against their annotations; within one tuple a name of an axis is one number."""
    return _check_fields


def _check_fields(result: Any) -> None:
    hints = get_type_hints(type(result))
    with jaxtyping.jaxtyped("context"):
        for name in result._fields:
            value = getattr(result, name)
            assert _is(value, hints[name]), f"{type(result).__name__}.{name} is no {hints[name]}: {_shape(value)}"


def _is(value: Any, kind: Any) -> bool:
    if kind is type(None):
        return value is None
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(item, get_args(kind)[0]) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        _check_fields(value)
    return isinstance(value, kind)


def _shape(value: Any) -> Any:
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value)


class Document(NamedTuple):
    """The source of the founding document's three programs."""

    encoder_decoder: str
    decoder_only: str
    experts: str

    def load(self, program: str) -> dict[str, Any]:
        """A fresh namespace with everything the program defines; its main part is not run."""
        namespace: dict[str, Any] = {"__name__": f"document_{program}"}
        exec(compile(getattr(self, program), f"<{program}>", "exec"), namespace)
        return namespace

    def main(self, program: str) -> str:
        """The program's main part."""
        _, main = getattr(self, program).split('if __name__ == "__main__":\n')
        return re.sub(r"^ {4}", "", main, flags=re.MULTILINE)


@pytest.fixture(scope="session")
def document() -> Document:
    path = os.environ.get("TRIGLOT_SEED")
    if not path:
        pytest.skip("TRIGLOT_SEED does not name the founding document")
    blocks = re.findall(r"```python\n(.*?)```", Path(path).read_text(encoding="utf-8"), re.DOTALL)
    return Document(*blocks[-3:])
