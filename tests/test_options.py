"""An option is one line: the command line, the checks and the names in messages are made from a field's."""

import argparse
from dataclasses import dataclass, fields, is_dataclass
from typing import get_args

import pytest

from progtuning.base.errors import InputError
from progtuning.cli.command import build_parser
from progtuning.cli.options import train_config
from progtuning.settings.options import Options, add_options, given, option, option_name, options
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import CheckpointConfig, DPSConfig, SquadConfig, TrainConfig
from tests.test_cli import call

CLASSES = (TrainConfig, PeftConfig, DPSConfig, SquadConfig, CheckpointConfig)
TRAIN = ["train", "--model", "m", "--task", "t", "--output-dir", "o"]


@dataclass(frozen=True)
class Cake(Options):
    eggs: int = option(3, "how many", at_least=1, at_most=12)
    sugar_share: float = option(0.5, "of the flour, 100%", at_least=0)
    filling: tuple[str, ...] = option(("jam",), "what lies within", choices=("jam", "nuts"), name="with")
    icing: str = option("none", "on top: {choices}", choices=("none", "lemon", "sugar"))
    layers: int | None = option(None, "of dough", metavar="N", at_least=1)
    candles: str | None = option(None, "for whom", is_text=True)
    sifted: bool = option(True, "the flour")
    in_haste: bool = option(False, "do not wait", is_flag=True)
    oven: tuple[int, int] = (180, 40)  # no option


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="bake", formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100))
    add_options(made, Cake)
    return made


def test_the_help_has_name_value_text_choices_and_default_of_each_option_and_no_other_field():
    lines = parser().format_help().split("options:")[1].splitlines()
    assert [line.strip() for line in lines if line][1:] == [
        "--eggs EGGS           how many (3)",
        "--sugar-share SHARE   of the flour, 100% (0.5)",
        "--with WITH           what lies within (jam)",
        "--icing ICING         on top: none, lemon or sugar (none)",
        "--layers N            of dough",
        "--candles CANDLES     for whom",
        "--sifted, --no-sifted",
        "the flour (true)",
        "--in-haste            do not wait",
    ]


def test_what_is_given_has_the_type_of_its_field_and_what_is_not_given_is_absent():
    assert given(parser().parse_args([]), Cake) == {}
    words = "--eggs 2 --sugar-share 1 --icing lemon --layers 4 --candles 007 --no-sifted --in-haste --with".split()
    values = given(parser().parse_args([*words, "jam, nuts"]), Cake)
    assert values == {
        "eggs": 2,
        "sugar_share": 1.0,
        "filling": ("jam", "nuts"),
        "icing": "lemon",
        "layers": 4,
        "candles": "007",
        "sifted": False,
        "in_haste": True,
    }
    assert type(values["sugar_share"]) is float and Cake(**values).layers == 4
    only = argparse.ArgumentParser()
    add_options(only, Cake, only=("eggs",))
    assert given(only.parse_args(["--eggs", "5"]), Cake) == {"eggs": 5}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eggs": 0}, "--eggs must be an integer in 1..12, got 0"),
        ({"eggs": 13}, "--eggs must be an integer in 1..12, got 13"),
        ({"eggs": 2.0}, "--eggs must be an integer in 1..12, got 2.0"),
        ({"eggs": True}, "--eggs must be an integer in 1..12, got True"),
        ({"eggs": None}, "--eggs must be an integer in 1..12, got None"),
        ({"sugar_share": -0.5}, "--sugar-share must be a number of at least 0, got -0.5"),
        ({"sugar_share": float("inf")}, "--sugar-share must be a number of at least 0, got inf"),
        ({"sugar_share": float("nan")}, "--sugar-share must be a number of at least 0, got nan"),
        ({"sugar_share": "1"}, "--sugar-share must be a number of at least 0, got '1'"),
        ({"filling": ()}, "--with must be among jam, nuts, got nothing"),
        ({"filling": ("jam", "soap")}, "--with must be among jam, nuts, got soap"),
        ({"icing": "mud"}, "--icing must be one of none, lemon, sugar, got 'mud'"),
        ({"layers": 0}, "--layers must be an integer of at least 1, got 0"),
    ],
)
def test_a_value_out_of_its_options_range_is_an_error_that_names_the_option(changes, message):
    for make in (Cake, Cake.check):
        with pytest.raises(InputError) as error:
            make(**changes)
        assert str(error.value) == message


def test_the_ends_of_a_range_and_none_where_it_is_the_type_are_taken():
    Cake(eggs=1, sugar_share=0, layers=None), Cake(eggs=12, sugar_share=1e300)


def test_every_number_among_the_settings_has_a_range_and_every_word_has_choices():
    for settings in CLASSES:
        for one in fields(settings):
            assert is_dataclass(one.type) or one.name in options(settings), f"{one.name} is no option"
        for name, one in options(settings).items():
            rule = one.metadata["option"]
            if one.type in (bool, bool | None) or name in ("spafit_bounds", "calendar", "class_weights"):
                continue
            assert (rule.choices is None) != (rule.at_least is None), name


PATHS = [
    f"{prefix}{name}"
    for prefix, settings in (("", TrainConfig), ("peft/", PeftConfig), ("dps/", DPSConfig), ("squad/", SquadConfig))
    for name in options(settings)
]
OTHER_VALUE = {int: "4", float: "0.25", bool: None}  # than any default
OTHER_TEXT = {"cache_limit": "2GB", "peft/spafit_bounds": "1,2", "peft/lora_targets": "output"}
OTHER_TEXT |= {"stages": "5", "calendar": "0:2,4:1", "class_weights": "balanced"}


@pytest.fixture(scope="module")
def train_parser() -> argparse.ArgumentParser:
    return build_parser()


@pytest.mark.parametrize("path", PATHS)
def test_every_setting_has_an_option_of_train_that_sets_it_and_by_which_a_refused_resume_tells_of_it(
    path, train_parser
):
    *outer, name = path.split("/")
    settings = {"peft": PeftConfig, "dps": DPSConfig, "squad": SquadConfig}[outer[0]] if outer else TrainConfig
    one = options(settings)[name]
    choices, kind = one.metadata["option"].choices, get_args(one.type)[0] if get_args(one.type) else one.type
    text = OTHER_TEXT.get(path) or (choices[-1] if choices else OTHER_VALUE[kind])
    word = option_name(TrainConfig, path)
    if kind is bool:
        words = [word.replace("--", "--no-") if one.default else word]
    else:
        words = [word, text]
    found = train_config(train_parser.parse_args([*TRAIN, *words]), num_blocks=12)
    for inner in outer:
        found = getattr(found, inner)
    assert getattr(found, name) != one.default


def test_a_setting_that_is_not_known_has_the_name_that_its_option_would_have():
    assert option_name(TrainConfig, "left_out") == "--left-out"
    assert option_name(TrainConfig, "peft/left_out") == "--left-out"
    assert option_name(TrainConfig, "lr/left_out") == "--lr-left-out"
    assert option_name(TrainConfig, "peft") == "--peft"


IN_VAIN = {  # options of train, and what is said of them
    "--lora-r 2": "--lora-r says nothing without --peft lora or spafit: leave it out, or give that too",
    "--peft bitfit --lora-pooler": "--lora-pooler says nothing without --peft lora",
    "--peft lora --adapter-size 3": "--adapter-size says nothing without --peft adapter",
    "--bitfit-biases all": "--bitfit-biases says nothing without --peft bitfit",
    "--peft lora --spafit-bounds 1,2": "--spafit-bounds says nothing without --peft spafit",
    "--dps-p 0.5": "--dps-p says nothing without --dps dense or mix",
    "--dps-update-ratio 0.1": "--dps-update-ratio says nothing without --dps dense or mix",
    "--cache-dtype bf16": "--cache-dtype says nothing without --cache memory or disk or device",
    "--cache-limit 1MB": "--cache-limit says nothing without --cache memory or disk or device",
    "--freeze-percentile 90": "--freeze-percentile says nothing without --schedule adaptive",
    "--doc-stride 64": "--doc-stride is for --task squad or squad_v2, got it with the task ",
}


@pytest.mark.parametrize("text", IN_VAIN)
def test_an_option_that_says_nothing_without_another_is_refused(text, tiny_folder, tiny_task, tmp_path):
    run = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task, "--output-dir", tmp_path / "run"]
    status, output, error = call("train", *run, *text.split(), "--device", "cpu")
    assert (status, output) == (2, "") and IN_VAIN[text] in error
    assert not (tmp_path / "run").exists()


def test_a_plan_and_a_comparison_refuse_them_too_but_what_they_make_use_of(tiny_folder, tiny_task, tmp_path):
    assert call("plan", "--model", "bert-base-uncased", "--lora-r", "2")[0] == 2
    assert call("plan", "--model", "bert-base-uncased", "--cache-dtype", "bf16")[0] == 0  # of the cache that it plans
    run = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task, "--output-dir", tmp_path / "run"]
    assert "--lora-r says nothing" in call("compare", *run, "--lora-r", "2", "--device", "cpu")[2]
    in_vain = ["--cache-dtype", "bf16", "--schedules", "full", "growing"]
    assert "--cache-dtype says nothing" in call("compare", *run, *in_vain, "--device", "cpu")[2]
    refused = call("reproduce", "table5", *run[:2], "--glue", tmp_path, *run[-2:], "--lora-r", "2", "--device", "cpu")
    assert "--lora-r says nothing without --peft lora or spafit" in refused[2]
    assert not (tmp_path / "run").exists()


def test_the_help_shows_the_default_that_an_option_has_in_its_command():
    def line(command: str, flag: str) -> str:
        text = " ".join(call(command, "--help")[1].split("options:")[1].split()).replace("with- block", "with-block")
        return text[text.index(f"{flag} ") :][:220]

    assert "always or never (with-block-1)" in line("train", "--embeddings EMBEDDINGS")
    assert "always or never (always)" in line("probe", "--embeddings EMBEDDINGS")
    of_recipe = line("reproduce", "--embeddings EMBEDDINGS")
    assert "always or never --" in of_recipe and "(with-block-1)" not in of_recipe
