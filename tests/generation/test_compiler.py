"""The C++ compiler is the one that is named, and what it cannot do is told before work starts."""

import pytest
import torch

from tests.conftest import WARNS_OF_ITSELF, needs_compiler
from tests.test_evaluation import make_run
from triglot.errors import ConfigError
from triglot.generation import aot, compiler, kernels
from triglot.generation.compiler import has_compiler, is_gcc
from triglot.generation.engine import load
from triglot.generation.int8 import multiplies_bytes
from triglot.generation.residual import NormKernel

pytestmark = WARNS_OF_ITSELF


@pytest.mark.parametrize("kind", ["decoder_only", "encoder_decoder"])
@pytest.mark.parametrize("known", ["no-compiler-of-this-name", "", "false", "'"])
def test_a_machine_without_a_compiler_is_told_before_work(make, kind, known, monkeypatch):
    monkeypatch.setenv("CXX", known)
    with pytest.raises(ConfigError, match=r"`compiled` must be left out where there is no C\+\+ comp"):
        make(kind, compiled=True)


@pytest.mark.usefixtures("without_shape_checks")  # which the compiler cannot trace
@needs_compiler
def test_the_compiler_may_be_a_command_with_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "env TRIGLOT_TEST=1 g++")
    x, layer = torch.ones(3, 48), torch.nn.Linear(48, 48)
    run = aot.bound(aot.compile_module(layer, (x,), (None,), 2**13), layer)
    torch.testing.assert_close(run([x])[0], layer(x))
    assert is_gcc()
    found = NormKernel(norm := torch.nn.LayerNorm(48), torch.float32).read_alone(x)
    torch.testing.assert_close(found, norm(x).detach())
    assert {path.suffix for path in (tmp_path / "triglot").iterdir()} == {".pt2", ".so", ""}


@needs_compiler
@pytest.mark.parametrize("unusable", ["a file", "a file/below"])
def test_a_folder_that_cannot_keep_code_is_told(unusable, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / unusable))
    with pytest.raises(ConfigError, match="`TORCHINDUCTOR_CACHE_DIR` must be a folder that can be written to, but is "):
        NormKernel(torch.nn.LayerNorm(64), torch.float32).read_alone(torch.ones(1, 64))


def test_a_compiler_that_makes_what_cannot_be_loaded_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    made_up = tmp_path / "c++"
    made_up.write_text('#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] || echo nothing > "$last"\n')
    made_up.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(made_up))
    with pytest.raises(ConfigError, match=r"`compiled` must be False .*: what the C\+\+ compiler makes of them cannot"):
        NormKernel(torch.nn.LayerNorm(80), torch.float32).read_alone(torch.ones(1, 80))
    assert not list((tmp_path / "triglot").iterdir())


KINDS = pytest.mark.parametrize("kind", ["decoder_only", "encoder_decoder"])


def by_kernels(make, kind: str, **how) -> bool:
    return make(kind, **how)._ready.prepared.by_kernels


needs_kernels = pytest.mark.skipif(not multiplies_bytes(), reason="kernels were not seen to pay on such a processor")


@needs_compiler
@needs_kernels
@KINDS
@pytest.mark.filterwarnings("error")
def test_texts_are_by_kernels_unless_that_is_not_wanted_or_the_model_is_in_training(make, kind, monkeypatch):
    assert by_kernels(make, kind)
    assert not by_kernels(make, kind, compiled=False)
    assert not by_kernels(make, kind, in_training=True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not by_kernels(make, kind)


@KINDS
@pytest.mark.filterwarnings("error")
def test_a_machine_without_a_compiler_goes_without_kernels_if_none_were_asked_for(make, kind, monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler-of-this-name")
    assert not by_kernels(make, kind)


ASKED = {
    "encoder_decoder": lambda engine: engine.translate(["ab"]),
    "decoder_only": lambda engine: engine.generate(["ab"]),
}


@needs_kernels
@needs_compiler
@pytest.mark.parametrize(
    ("kind", "file"),
    [(kind, file) for kind in ASKED for file in ("norms", "paged", "activations")] + [("encoder_decoder", "top")],
)
def test_of_a_compiler_that_fails_users_are_told_and_go_on_without(make, kind, file, tmp_path, monkeypatch):
    failing = tmp_path / "c++"
    failing.write_text(f'#!/bin/sh\ncase "$*" in *{file}.cpp*) exit 1;; esac\nexec g++ "$@"\n')
    failing.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(failing))
    kernels.kernel.cache_clear()
    ask, how = ASKED[kind], {"d_model": 32, "d_ff": 32, "options": {"norm_order": "pre", "activation": "gelu"}}
    with pytest.warns(UserWarning, match="texts will take longer, since no kernels could be compiled"):
        found = ask(make(kind, **how))
    assert found == ask(make(kind, compiled=False, **how))


@needs_kernels
@needs_compiler
def test_workers_are_told_whether_to_translate_by_kernels(tmp_path, monkeypatch):
    folder = make_run(tmp_path, "encoder_decoder")
    for known, expected in (("g++", True), ("no-compiler-of-this-name", False)):
        monkeypatch.setenv("CXX", known)
        engine = load(folder, device="cpu", workers=2)
        *_, compiled = engine._workers.pool._initargs[0].args
        assert compiled == expected
        engine.close()


@needs_compiler
def test_code_that_others_may_have_put_there_is_not_run(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(compiler, "_default_folder", lambda: tmp_path)
    assert has_compiler()
    assert (tmp_path / "triglot").stat().st_mode & 0o077 == 0
    monkeypatch.setattr("os.getuid", lambda: tmp_path.stat().st_uid + 1)
    assert not has_compiler()
    with pytest.raises(ConfigError, match="`TORCHINDUCTOR_CACHE_DIR` must be a folder of this user's own, but is"):
        NormKernel(torch.nn.LayerNorm(112), torch.float32).read_alone(torch.ones(1, 112))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "named"))
    assert has_compiler()
