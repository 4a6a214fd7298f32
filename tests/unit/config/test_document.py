"""The files written from the schema are up to date, and the file of defaults says what the schema says."""

import pytest

from megatron_gkd.config import ConfigError, GkdConfig, document, load_config
from megatron_gkd.config.loss import LossOptions, LossSettings
from tests.support.processes import ROOT


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (document.DEFAULTS_FILE, document.render_defaults()),
        (document.REFERENCE_FILE, document.render_reference()),
    ],
    ids=["defaults", "reference"],
)
def test_generated_files_are_up_to_date(file, text):
    assert (ROOT / file).read_text() == text, "run `make docs`"


def test_the_file_of_defaults_adds_nothing_to_the_required_keys(tree, config_file):
    overrides = [f"{section}.{key}={value}" for section, keys in tree.items() for key, value in keys.items()]
    assert load_config(ROOT / document.DEFAULTS_FILE, overrides) == GkdConfig.model_validate(tree)


def test_the_file_of_defaults_alone_names_what_is_required():
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / document.DEFAULTS_FILE)
    for key in ("data.prompts", "train.global_batch_size", "train.output_dir"):
        assert f"{key}: is required" in str(caught.value)
    assert "student: give exactly one of hf and checkpoint" in str(caught.value)


def test_the_options_of_the_public_losses_are_the_settings():
    assert list(LossOptions.__annotations__) == list(LossSettings.model_fields)
