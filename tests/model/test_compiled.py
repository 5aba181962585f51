"""How the C code is compiled and found again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lib.errors import InputError
from lib.model import compiled

pytestmark = pytest.mark.skipif(not compiled.is_available(), reason="no C compiler here")


def test_a_half_written_library_is_never_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(compiled.built, ["cc", "cc"]))
    assert made[0] == made[1]
    assert [path.name for path in (tmp_path / "seps").iterdir()] == [made[0].name]
    assert compiled.built("cc") == made[0]


def test_a_changed_file_is_compiled_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, header = tmp_path / "native_a.c", tmp_path / "native_a.h"
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    code.write_text('#include "native_a.h"\nint number(void) { return NUMBER; }\n')
    header.write_text("#define NUMBER 1\n")
    one = compiled.built("cc")
    header.write_text("#define NUMBER 2\n")
    other = compiled.built("cc")
    assert one != other
    assert [compiled.ctypes.CDLL(str(path)).number() for path in (one, other)] == [1, 2]


def test_the_environment_chooses_the_vectors(monkeypatch):
    monkeypatch.setenv("SEPS_NATIVE", "0")
    assert compiled.library() is None
    monkeypatch.setenv("SEPS_NATIVE", "")
    wide = compiled.library()
    monkeypatch.setenv("SEPS_NATIVE", "1")
    assert compiled.library() is wide
    monkeypatch.setenv("SEPS_NATIVE", "off")
    with pytest.raises(InputError, match="SEPS_NATIVE=off: known are 0"):
        compiled.library()
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("no AVX-512 to leave out")
    monkeypatch.setenv("SEPS_NATIVE", "avx2")
    assert compiled.library() not in (None, wide)


def test_a_failing_function_is_told(monkeypatch):
    class Library:
        @staticmethod
        def fails(job: int) -> int:
            return job

    monkeypatch.setattr(compiled, "library", lambda: Library)
    compiled.call("fails", [(0,), (0,)])
    with pytest.raises(MemoryError):
        compiled.call("fails", [(0,), (1,)])


def test_without_a_home_folder_pytorch_serves(monkeypatch):
    def unknown(cls):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", classmethod(unknown))
    assert compiled._loaded.__wrapped__(()) is None
