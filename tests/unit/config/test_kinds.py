"""The capabilities of teachers and engines, and rules that follow them for a kind that no rule names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from typing_extensions import override

from megatron_gkd.config import ConfigError, GkdConfig, check_config, load_config
from megatron_gkd.config.base import sections_of
from megatron_gkd.config.model import ModelConfig
from megatron_gkd.config.rollout import BaseRolloutConfig
from megatron_gkd.config.teacher import BaseTeacherConfig

TEACHERS = sections_of(GkdConfig.model_fields["teacher"])
ENGINES = sections_of(GkdConfig.model_fields["rollout"])


class RecordedTeacherConfig(BaseTeacherConfig):
    """Answers of a teacher, read from a folder: a kind that the package does not have."""

    kind: Literal["recorded"] = "recorded"
    folder: Path

    @property
    @override
    def hf_folder(self) -> Path:
        return self.folder

    @override
    def vocabulary_problems(self, vocab_size: int) -> Iterator[str]:
        yield f"teacher.folder={str(self.folder)!r} was recorded for another vocab_size than {vocab_size}"


class EmbeddedRolloutConfig(BaseRolloutConfig):
    """An engine over the student's layers that the package does not have."""

    uses_student_model = True
    kind: Literal["embedded"] = "embedded"


@pytest.mark.parametrize("kind", TEACHERS)
def test_the_capabilities_of_a_teacher_agree(kind):
    section = TEACHERS[kind]
    assert issubclass(section, BaseTeacherConfig)
    assert section.on_ranks == issubclass(section, ModelConfig)
    assert section.gives_signal or not (section.gives_full_distribution or section.on_ranks)


@pytest.mark.parametrize("kind", ENGINES)
def test_the_section_of_an_engine_has_the_keys_and_capabilities_of_all(kind):
    assert issubclass(ENGINES[kind], BaseRolloutConfig)


def test_a_new_teacher_kind_is_checked_by_its_capabilities(config_file, tree):
    config = load_config(config_file)
    teacher = RecordedTeacherConfig(folder=tree["teacher"]["hf"])
    with pytest.raises(ConfigError) as caught:
        check_config(config.model_copy(update={"teacher": teacher}))
    message = str(caught.value)
    assert "loss.support=full needs the teacher's whole distribution, and teacher.kind=recorded" in message
    assert "set loss.support=teacher_top_k or use teacher.kind=megatron" in message
    assert "was recorded for another vocab_size than 1003" in message


def test_a_new_engine_kind_is_checked_by_its_capabilities(config_file):
    overrides = ["student.parallel={tensor_model_parallel_size: 2, sequence_parallel: true}"]
    config = load_config(config_file, overrides)
    with pytest.raises(ConfigError, match=r"rollout.kind=embedded generates one.*or use rollout.kind=sglang"):
        check_config(config.model_copy(update={"rollout": EmbeddedRolloutConfig()}))
