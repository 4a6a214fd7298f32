"""Which attention back end the environment asks for. That Megatron takes it: tests/distributed/test_student_step.py."""

import pytest

from megatron_gkd.config import ConfigError
from megatron_gkd.platform.kernels import ATTENTION_VARIABLES, attention_backend


@pytest.mark.parametrize(
    ("values", "name"),
    [("111", "auto"), ("100", "flash"), ("010", "fused"), ("001", "unfused"), ("000", "local")],
)
def test_the_variables_name_a_back_end(values, name):
    assert attention_backend(dict(zip(ATTENTION_VARIABLES, values, strict=True))) == name


def test_an_unset_variable_allows_its_back_end():
    assert attention_backend({}) == "auto"
    assert attention_backend({"NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}) == "flash"


@pytest.mark.parametrize("value", ["0", "yes"])
def test_what_megatron_cannot_express_is_refused_with_the_fix(value):
    with pytest.raises(
        ConfigError, match=f"NVTE_FUSED_ATTN={value} .*set one of them to 1 and the others to 0"
    ):
        attention_backend({"NVTE_FUSED_ATTN": value})
