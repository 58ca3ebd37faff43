"""Every launch table row compiles for its GPUs, within shared memory and without spilling."""

import importlib
import re
from pathlib import Path

import pytest

import hamner.kernels
from hamner.kernels.launch import CAPABILITIES
from tests.kernels import compile_cases
from tests.kernels.compile_gate import CompileResult, compiler, ops

MATMUL_OPS = ("flash_attention", "int8_matmul", "moe", "muon")


@pytest.fixture(scope="module")
def compile_op():
    with compiler() as compile_there:
        yield compile_there


@pytest.mark.parametrize("op", ops())
def test_fits(op, compile_op, record_property):
    results = compile_op(op)
    # tests/conftest.py prints these rows at the end, from whichever process ran this.
    record_property("compile_gate", [result.row(op) for result in results])
    assert {result.capability for result in results} == set(CAPABILITIES)
    labels = [(result.name, result.capability) for result in results]
    assert len(set(labels)) == len(labels), "two cases of the same name"
    problems = [problem for result in results for problem in result.problems()]
    assert not problems, "\n".join(problems)
    # Triton may make a dot of a product and a sum, less exact than fp32: no other op wants one.
    assert any(result.uses_tensor_cores for result in results) == (op in MATMUL_OPS)

    if op == "int8_matmul":
        assert_reads_whole_words(results)
    if op == "rms_norm":
        assert_norms_as_without_int8(results)


def assert_reads_whole_words(results: list[CompileResult]):
    """An int8 matmul of sm_86 has its largest tensor-core instruction, and loads no bytes from
    shared memory, which is what operands in another order become."""
    matmuls = [r for r in results if r.capability == "8.6" and r.uses_tensor_cores]
    assert len(matmuls) == 4
    for result in matmuls:
        assert any(name.startswith("IMMA.16832.S8.S8") for name in result.instructions), result
        assert not {"LDS.U8", "LDS.S8"}.intersection(result.instructions), result


def assert_norms_as_without_int8(results: list[CompileResult]):
    """A norm that writes int8 sums up its squares in the order of one that does not, or what it
    quantises would not be, to the bit, what the other writes."""
    summed = {(result.name, result.capability): result.summed for result in results}
    quantising = [label for label in summed if label[0].endswith("/int8")]
    assert len(quantising) == (2 * 2 + 4) * len(CAPABILITIES)
    for name, capability in quantising:
        assert summed[name, capability], name
        without = summed[name.removesuffix("/int8").removesuffix("/no y"), capability]
        assert summed[name, capability] == without, name


def test_no_kernel_is_left_out():
    """Every function of kernels/ that a launcher starts, by its name, has a case."""
    kernels = Path(hamner.kernels.__path__[0])
    named = r"@triton\.jit.*\n(?:@.*\n)*def (\w+_kernel)\("
    launched = {
        name for path in kernels.glob("*.py") for name in re.findall(named, path.read_text())
    }
    compiled = {
        case.kernel.__name__
        for op in ops()
        for case in importlib.import_module(f"{compile_cases.__name__}.{op}").cases()
    }
    assert launched == compiled


def test_reports_too_much_shared_memory_and_spills():
    assert CompileResult("k", "8.6", registers=255, stack=0, shared=101_376).problems() == []
    assert len(CompileResult("k", "8.6", registers=255, stack=8, shared=101_377).problems()) == 2
    assert CompileResult("k", "9.0", registers=255, stack=0, shared=101_377).problems() == []
