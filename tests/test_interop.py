"""Fine-tuned parameters on disk: LoRA in the format of the library peft, both ways, and files of what was trained."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from progtuning.base.errors import InputError, RunError
from progtuning.cost.closed_form import units
from progtuning.methods.apply import apply_peft, trainable_names
from progtuning.methods.lora import merge, unwrap
from progtuning.methods.saved import base_digest, base_model_name, load_peft, load_tuned, save_peft, tuned_config
from progtuning.model.bert import Model
from progtuning.model.config import BertConfig
from progtuning.model.names import BLOCK_LINEARS
from progtuning.model.weights import load_model, save_pretrained
from progtuning.run.finetune import write_model
from progtuning.run.saved import load_checkpoint
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import TrainConfig
from tests.conftest import WORDS
from tests.models import TINY, linear_pattern, tiny_batch, tiny_model

ALL_TARGETS = tuple(BLOCK_LINEARS)
HEADS = {
    "classification": ("SEQ_CLS", "AutoModelForSequenceClassification"),
    "regression": ("SEQ_CLS", "AutoModelForSequenceClassification"),
    "multi-label": ("SEQ_CLS", "AutoModelForSequenceClassification"),
    "question-answering": ("QUESTION_ANS", "AutoModelForQuestionAnswering"),
}
SETTINGS = [
    PeftConfig("adapter", adapter_size=3, adapter_activation="relu"),
    PeftConfig("adapter", adapter_size=2, adapter_layer_norms=False),
    PeftConfig("bitfit"),
    PeftConfig("bitfit", bitfit_biases="query,intermediate"),
    PeftConfig("spafit", lora_r=2, spafit_bounds=(1, 2), lora_targets=("key", "output")),
    PeftConfig("spafit", lora_r=2),
]
LORA = PeftConfig("lora", lora_r=3, lora_alpha=5.0)


def under_head(model: Model, head: str | None, labels=()) -> Model:
    """The same encoder under another, random head."""
    other = base_model(head, labels)
    encoder = {name: t for name, t in model.state_dict().items() if name.startswith(("embeddings.", "encoder."))}
    other.load_state_dict(encoder, strict=False)
    return other


def base_model(head: str | None = "classification", labels=("a", "b", "c"), **changes) -> Model:
    config = TINY.with_head(head, labels)
    return tiny_model(**{"head": head, "labels": config.labels, **changes}).eval()


def train(model: Model, peft: PeftConfig) -> Model:
    """Apply the method, and move everything that it trains far from its start."""
    apply_peft(model, peft)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Model) -> torch.Tensor:
    """The head's output; for question answering, of real tokens only."""
    batch = tiny_batch(model.config)
    with torch.no_grad():
        output = model(**batch)
    return output[batch["attention_mask"]] if model.config.head == "question-answering" else output


def their_logits(model, config: BertConfig) -> torch.Tensor:
    """The same of a model of transformers, inside which peft has put its layers.

    peft 0.21's own forward for question answering loses token_type_ids, so the model that it wraps is called.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    batch = tiny_batch(config)
    with torch.no_grad():
        output = model.eval()(**{key: value.long() for key, value in batch.items()})
    if config.head != "question-answering":
        return output.logits
    return torch.stack((output.start_logits, output.end_logits), -1)[batch["attention_mask"]]


def their_base(folder, head: str):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, HEADS[head][1]).from_pretrained(folder)


@pytest.fixture
def folders(tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    base.mkdir()
    tuned.mkdir()
    return base, tuned


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def rewrite(path, change, metadata=None):
    tensors = load_file(path)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)


# LoRA and the library peft


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "distilbert", "electra"])
@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize(
    "targets", [("query", "value"), ("output",), ("attention-output",), ("intermediate", "key"), ALL_TARGETS]
)
def test_peft_loads_what_we_write_with_equal_logits(model_type, head, targets, folders):
    peft = pytest.importorskip("peft")
    base, tuned = folders
    model = base_model(model_type=model_type, pad_token_id=1, head=head)
    save_pretrained(model, base)
    settings = PeftConfig("lora", lora_r=3, lora_alpha=5.0, lora_dropout=0.1, lora_targets=targets)
    save_peft(train(model, settings), tuned, settings, str(base))
    twin = peft.PeftModel.from_pretrained(their_base(base, head), tuned)
    assert sum("lora_A" in name for name, _ in twin.named_parameters()) == 4 * len(targets)
    torch.testing.assert_close(their_logits(twin, model.config), logits(model), atol=1e-5, rtol=1e-5)
    before = their_logits(their_base(base, head), model.config)
    assert not torch.allclose(before, logits(model), atol=1e-2)  # it is the file that made them equal


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra"])
@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("targets", [("query", "value"), ALL_TARGETS])
def test_what_peft_writes_loads_here_with_equal_logits(model_type, head, targets, folders):
    peft = pytest.importorskip("peft")
    base, tuned = folders
    model = base_model(model_type=model_type, pad_token_id=1, head=head)
    save_pretrained(model, base)
    modules = linear_pattern(targets, model.config)
    config = peft.LoraConfig(task_type=HEADS[head][0], r=3, lora_alpha=5, lora_dropout=0.1, target_modules=modules)
    twin = peft.get_peft_model(their_base(base, head), config)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    twin.save_pretrained(tuned)
    loaded = load_peft(model, tuned)
    assert loaded == PeftConfig("lora", lora_r=3, lora_alpha=5, lora_dropout=0.1, lora_targets=targets)
    assert base_model_name(tuned)[:2] == (str(base), None)
    torch.testing.assert_close(logits(model), their_logits(twin, model.config), atol=1e-5, rtol=1e-5)


def test_the_keys_are_those_that_peft_writes(folders):
    peft = pytest.importorskip("peft")
    base, tuned = folders
    theirs = tuned.parent / "theirs"
    model = base_model()
    save_pretrained(model, base)
    save_peft(train(model, LORA), tuned, LORA, "some/base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=["query", "value"])
    peft.get_peft_model(their_base(base, "classification"), config).save_pretrained(theirs)
    ours = load_file(tuned / "adapter_model.safetensors")
    expected = load_file(theirs / "adapter_model.safetensors")
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in expected.items()}
    written = json.loads((tuned / "adapter_config.json").read_text())
    assert written.keys() <= json.loads((theirs / "adapter_config.json").read_text()).keys()
    assert written["target_modules"] == ["query", "value"] and written["base_model_name_or_path"] == "some/base"


def test_a_pooler_that_lora_trains_goes_to_peft_and_back(folders):
    peft = pytest.importorskip("peft")
    base, tuned = folders
    theirs, settings = tuned.parent / "theirs", replace(LORA, lora_pooler=True)
    model, again = base_model(), base_model()
    before = model.pooler.dense.weight.clone()
    save_pretrained(model, base)
    save_peft(train(model, settings), tuned, settings, str(base))
    assert not torch.equal(model.pooler.dense.weight, before)
    twin = peft.PeftModel.from_pretrained(their_base(base, "classification"), tuned, is_trainable=True)
    torch.testing.assert_close(their_logits(twin, model.config), logits(model), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in twin.parameters() if p.requires_grad) == units(model.config, settings).num_trainable
    twin.save_pretrained(theirs)
    ours, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tuned, theirs))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)
    assert load_peft(again, theirs) == settings
    assert torch.equal(logits(again), logits(model)) and again.pooler.dense.weight.requires_grad


def test_a_bare_encoders_lora_goes_through_peft_and_back(folders):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base, tuned = folders
    model = base_model(head=None)
    save_pretrained(model, base)
    save_peft(train(model, LORA), tuned, LORA, str(base))
    twin = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base, add_pooling_layer=False), tuned)
    mask = tiny_batch(model.config)["attention_mask"]
    batch = {key: value.long() for key, value in tiny_batch(model.config).items()}
    with torch.no_grad():
        theirs = twin.eval()(**batch).last_hidden_state
    torch.testing.assert_close(theirs[mask], logits(model)[mask], atol=1e-5, rtol=1e-5)
    again = base_model(head=None)
    load_peft(again, tuned)
    assert torch.equal(logits(again), logits(model))


def test_a_folder_of_peft_without_a_head_leaves_the_bases_head(folders):
    peft = pytest.importorskip("peft")
    base, tuned = folders
    model = base_model()
    save_pretrained(model, base)
    twin = peft.get_peft_model(their_base(base, "classification"), peft.LoraConfig(r=2, target_modules=["query"]))
    twin.save_pretrained(tuned)
    classifier = model.classifier.weight.clone()
    load_peft(model, tuned)
    assert torch.equal(model.classifier.weight, classifier)


@pytest.fixture
def lora_folder(folders):
    base, tuned = folders
    model = base_model()
    save_pretrained(model, base)
    save_peft(train(model, LORA), tuned, LORA, str(base))
    return tuned


def test_lora_comes_back_bit_for_bit_and_merged_or_not_the_same_is_written(lora_folder):
    original, loaded = train(base_model(), LORA), base_model()
    assert load_peft(loaded, lora_folder) == LORA
    assert torch.equal(logits(loaded), logits(original))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trainable_names(original, LORA)
    merge(original)
    again = lora_folder.parent / "again"
    again.mkdir()
    save_peft(original, again, LORA, str(lora_folder.parent / "base"))
    for name in ("adapter_config.json", "config.json"):
        assert (again / name).read_bytes() == (lora_folder / name).read_bytes()
    assert contents(again / "adapter_model.safetensors") == contents(lora_folder / "adapter_model.safetensors")


def contents(path) -> tuple[dict, dict]:
    """The metadata and the tensors' bytes of a safetensors file, in which the library orders metadata at random."""
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}


def test_a_merged_and_unwrapped_model_is_a_plain_transformers_model(lora_folder):
    model = base_model()
    load_peft(model, lora_folder)
    expected = logits(model)
    unwrap(model)
    plain = lora_folder.parent / "plain"
    plain.mkdir()
    save_pretrained(model, plain)
    ours, report = load_model(plain, fresh_head=False)
    assert not report.fresh and not report.unused
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
    theirs = their_logits(their_base(plain, "classification"), model.config)
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "key 'use_dora' changes what LoRA computes and is not supported, got True"),
        ({"bias": "all"}, "'bias' .* got 'all'"),
        ({"bias": "lora_only"}, "'bias'"),
        ({"lora_bias": True}, "'lora_bias'"),
        ({"rank_pattern": {"query": 4}}, "'rank_pattern'"),
        ({"alpha_pattern": {"query": 4}}, "'alpha_pattern'"),
        ({"layers_to_transform": [0, 1]}, "'layers_to_transform'"),
        ({"layers_to_transform": 0}, None),  # 0 is not off: it is a layer
        ({"layer_replication": [[0, 2]]}, "'layer_replication'"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out'"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights'"),
        ({"trainable_token_indices": [3]}, "'trainable_token_indices'"),
        ({"a_key_of_tomorrow": "on"}, "'a_key_of_tomorrow'"),
        ({"peft_type": "IA3"}, "'peft_type' must be 'LORA', got 'IA3'"),
        ({"r": 4}, "has shape"),
        ({"r": 0}, "--lora-r must be an integer of at least 1, got 0"),
        ({"r": None}, "--lora-r must be an integer"),
        ({"r": 17}, "--lora-r must be"),
        ({"lora_alpha": "16"}, "--lora-alpha must be a number"),
        ({"lora_dropout": 2}, "--lora-dropout must be a number in 0..1"),
    ],
)
def test_settings_that_change_the_mathematics_are_refused_by_name(changes, message, lora_folder):
    edit(lora_folder / "adapter_config.json", **changes)
    model = base_model()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError, match=message or "'layers_to_transform'") as error:
        load_peft(model, lora_folder)
    assert str(lora_folder) in str(error.value) and "\n" not in str(error.value)
    assert [name for name, _ in model.named_parameters()] == names  # as it was


@pytest.mark.parametrize("setting", [{"init_lora_weights": "gaussian"}, {"use_dora": False}, {"key_of_tomorrow": None}])
def test_settings_that_change_nothing_are_accepted(setting, lora_folder):
    edit(lora_folder / "adapter_config.json", **setting)
    load_peft(base_model(), lora_folder)


PREFIX = "base_model.model.bert."
POOLER = f"{PREFIX}pooler.dense"
QUERY = f"{PREFIX}encoder.layer.1.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(QUERY), "layer.1.attention.self.query.lora_A.weight' is missing"),
        (lambda t: t.pop("base_model.model.classifier.bias"), "'classifier.bias' is missing"),
        (lambda t: t.update({f"{PREFIX}embeddings.LayerNorm.bias": torch.zeros(16)}), "Norm.bias' is unexpected"),
        (lambda t: t.update({f"{POOLER}.weight": torch.zeros(16, 16)}), "trained on another base model"),
        (lambda t: t.update({f"{POOLER}.lora_A.weight": torch.zeros(3, 16)}), "LoRA is supported on attention"),
        (lambda t: t.update({QUERY: torch.zeros(3, 15)}), r"has shape \[3, 15\], expected \[3, 16\]"),
        (lambda t: t.update({QUERY: torch.zeros(3, 16, dtype=torch.int64)}), "has dtype I64"),
        (lambda t: [t.pop(key) for key in list(t) if "lora_" in key], "no tensor of LoRA"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, lora_folder):
    path = lora_folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    rewrite(path, change, metadata)
    with pytest.raises(InputError, match=message) as error:
        load_peft(base_model(), lora_folder)
    assert str(lora_folder) in str(error.value)


def test_lora_of_lower_precision_is_read_as_fp32(lora_folder):
    path = lora_folder / "adapter_model.safetensors"
    rewrite(path, lambda t: t.update({key: value.bfloat16() for key, value in t.items()}))
    model = base_model()
    load_peft(model, lora_folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# What only was trained


@pytest.mark.parametrize("peft", [*SETTINGS, LORA], ids=str)
@pytest.mark.parametrize("changes", [{}, {"model_type": "roberta"}, {"head": "question-answering"}], ids=str)
def test_exactly_what_was_trained_is_written_and_comes_back_bit_for_bit(peft, changes, folders):
    _, tuned = folders
    model, base = train(base_model(**changes), peft), base_model(**changes)
    save_peft(model, tuned, peft, "some/base")
    names = trainable_names(model, peft)
    weights = "adapter_model.safetensors" if peft.method == "lora" else "trained.safetensors"
    written = load_file(tuned / weights)
    prefix = f"{model.config.model_type}."
    assert {key.removeprefix("base_model.model.").removeprefix(prefix) for key in written} == names
    config = BertConfig.from_json(tuned / "config.json")
    assert config.to_dict() == model.config.to_dict() and base_model_name(tuned).name == "some/base"
    assert load_peft(base, tuned) == peft
    assert not base.training and not any(module.training for module in base.modules())
    assert {n for n, p in base.named_parameters() if p.requires_grad} == names
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)), name
    assert torch.equal(logits(base), logits(model))


@pytest.fixture
def poolerless(folders):
    """The folder of a base without a pooler, as masked language models are saved."""
    base, _ = folders
    save_pretrained(base_model(), base)
    rewrite(base / "model.safetensors", lambda t: [t.pop(key) for key in list(t) if "pooler" in key or "class" in key])
    return base


@pytest.mark.parametrize("peft", [*SETTINGS, LORA], ids=str)
def test_a_pooler_that_the_base_lacks_is_written_too_and_does_not_depend_on_the_next_draw(peft, poolerless, folders):
    _, tuned = folders
    model, report = load_model(poolerless, TINY, seed=1)
    assert "pooler.dense.weight" in report.fresh
    save_peft(train(model, peft), tuned, peft, "some/base", fresh=report.fresh)
    again, _ = load_model(poolerless, TINY, seed=2)
    assert not torch.equal(again.pooler.dense.weight, model.pooler.dense.weight)
    load_peft(again, tuned)
    assert torch.equal(logits(again), logits(model))


def test_peft_loads_a_pooler_that_the_base_lacks(poolerless, folders):
    peft = pytest.importorskip("peft")
    _, tuned = folders
    edit(poolerless / "config.json", id2label={"0": "a", "1": "b", "2": "c"})
    model, report = load_model(poolerless, TINY, seed=1)
    save_peft(train(model, LORA), tuned, LORA, str(poolerless), fresh=report.fresh)
    assert json.loads((tuned / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "pooler"]
    twin = peft.PeftModel.from_pretrained(their_base(poolerless, "classification"), tuned)
    torch.testing.assert_close(their_logits(twin, model.config), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("peft", [*SETTINGS, LORA], ids=str)
def test_another_base_is_refused_by_a_single_changed_bit(peft, folders):
    _, tuned = folders
    save_peft(train(base_model(), peft), tuned, peft, "some/base")
    for name in ("embeddings.word_embeddings.weight", "encoder.layer.3.output.dense.weight", "pooler.dense.weight"):
        other = base_model()
        with torch.no_grad():
            other.get_parameter(name).view(torch.int32)[0, 0] ^= 1
        with pytest.raises(InputError, match="trained on another base model: .* SHA-256 .*, those of ") as error:
            load_peft(other, tuned)
        assert str(tuned) in str(error.value)
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in base_model().named_parameters()]
    load_peft(base_model(), tuned)


def test_another_architecture_is_refused(folders):
    _, tuned = folders
    peft = PeftConfig("bitfit")
    save_peft(train(base_model(), peft), tuned, peft, "some/base")
    for changes in ({"num_hidden_layers": 5}, {"intermediate_size": 25}, {"vocab_size": 61}):
        with pytest.raises(InputError, match="another base model"):
            load_peft(base_model(**changes), tuned)
    other = under_head(base_model(), "classification", ("a", "b"))
    other.pooler.load_state_dict(base_model().pooler.state_dict())
    with pytest.raises(InputError, match=r"'classifier.bias' has shape \[3\], expected \[2\]"):
        load_peft(other, tuned)


def test_the_digest_is_of_the_base_alone():
    plain = base_model()
    digest = base_digest(plain, trainable_names(plain, PeftConfig("bitfit")))
    trained = train(base_model(), PeftConfig("bitfit"))
    assert base_digest(trained, trainable_names(trained, PeftConfig("bitfit"))) == digest
    wrapped = train(base_model(), LORA)
    names = trainable_names(wrapped, LORA)
    expected = base_digest(plain, names)
    assert base_digest(wrapped, names) == expected != digest
    merge(wrapped)
    assert base_digest(wrapped, names) == expected
    bare = {name for name, _ in plain.named_parameters() if name.startswith(("pooler.", "classifier."))}
    for head, own in (("classification", bare), ("question-answering", {"qa_outputs.weight", "qa_outputs.bias"})):
        assert base_digest(under_head(plain, head, ("a", "b")), own) == base_digest(plain, bare)
    assert base_digest(under_head(plain, None), ()) == base_digest(plain, bare)


def test_the_digest_is_what_its_docstring_says():
    model = base_model(head=None)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} torch.float32 {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    assert base_digest(model, ()) == digest.hexdigest()


@pytest.fixture
def bitfit_folder(folders):
    _, tuned = folders
    peft = PeftConfig("bitfit")
    save_peft(train(base_model(), peft), tuned, peft, "some/base")
    return tuned


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft": None}, "key 'peft' must be an object, got None"),
        ({"peft": {"method": "bitfit", "speed": 3}}, "speed"),
        ({"peft": {"method": "prefix"}}, "--peft must be one of"),
        ({"peft": {"method": "spafit", "spafit_bounds": [1]}}, "trained.json: "),
        ({"peft": {"method": "spafit", "spafit_bounds": [1, 9]}}, "trained.json: --spafit-bounds"),
        ({"peft": {"method": "lora", "lora_r": 99}}, "trained.json: --lora-r"),
        ({"peft": {"method": "lora", "lora_targets": 5}}, "trained.json: "),
        ({"base_sha256": None}, "another base model"),
        ({"base_sha256": 5}, "another base model"),
    ],
)
def test_a_damaged_description_is_an_error_that_names_it(changes, message, bitfit_folder):
    edit(bitfit_folder / "trained.json", **changes)
    with pytest.raises(InputError, match=message) as error:
        load_peft(base_model(), bitfit_folder)
    assert "\n" not in str(error.value)


def test_files_that_are_missing_or_damaged_are_named(bitfit_folder):
    path = bitfit_folder / "trained.safetensors"
    rewrite(path, lambda t: t.pop("bert.encoder.layer.0.output.dense.bias"))
    with pytest.raises(InputError, match="trained.safetensors: tensor 'encoder.layer.0.output.dense.bias' is missing"):
        load_peft(base_model(), bitfit_folder)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="trained.safetensors: not a readable safetensors file"):
        load_peft(base_model(), bitfit_folder)
    path.unlink()
    with pytest.raises(InputError, match="trained.safetensors"):
        load_peft(base_model(), bitfit_folder)
    for text, message in (("[]", "expected a JSON object, got list"), ("{", "not JSON")):
        (bitfit_folder / "trained.json").write_text(text)
        for read in (lambda: base_model_name(bitfit_folder), lambda: load_peft(base_model(), bitfit_folder)):
            with pytest.raises(InputError, match=f"trained.json: .*{message}"):
                read()
    shutil.rmtree(bitfit_folder)
    with pytest.raises(InputError, match="trained.json: cannot be read"):
        load_peft(base_model(), bitfit_folder)


def test_a_folder_of_a_whole_model_names_no_base_and_a_nameless_base_is_an_error(folders, bitfit_folder):
    base, _ = folders
    save_pretrained(base_model(), base)
    assert base_model_name(base) is None
    edit(bitfit_folder / "trained.json", base_model="")
    with pytest.raises(InputError, match="trained.json: key 'base_model' must name the base model, got ''"):
        base_model_name(bitfit_folder)


def test_whole_models_are_not_written_by_save_peft(tmp_path):
    with pytest.raises(ValueError, match="save_pretrained"):
        save_peft(base_model(), tmp_path, PeftConfig(), "some/base")


def test_a_disk_that_refuses_leaves_no_half_written_file(tmp_path):
    model = train(base_model(), LORA)
    with pytest.raises(RunError, match="cannot be written"):
        save_peft(model, tmp_path / "missing", LORA, "some/base")
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(RunError, match="adapter_config.json: cannot be written"):
        save_peft(model, tmp_path, LORA, "some/base")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


# Folders as peft writes them: which head they have, and on which base


@pytest.fixture(scope="module")
def vocabulary() -> str:
    return "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n"


@pytest.fixture
def their_folder(folders, vocabulary):
    """Make a base from a model of ours, and beside it the folder that peft writes of a LoRA on it; return peft's model.

    `without` are the parts of the tensors' names that the base's file is to lack.
    """
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

    def make(model: Model, name: str, without=(), config=None, labels=None, **settings):
        base, tuned = folders
        save_pretrained(model, base)
        (base / "vocab.txt").write_text(vocabulary)
        (base / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        rewrite(base / "model.safetensors", lambda t: [t.pop(k) for k in list(t) if any(part in k for part in without)])
        options = {"num_labels": labels} if labels else {}
        torch.manual_seed(0)
        theirs = getattr(transformers, name).from_pretrained(base, ignore_mismatched_sizes=True, **options)
        values = {"task_type": "SEQ_CLS", "r": 3, "lora_alpha": 5, "target_modules": ["query", "value"], **settings}
        twin = peft.get_peft_model(theirs, (config or peft.LoraConfig)(**values)).eval()
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        twin.save_pretrained(tuned)
        return twin

    return make


CLASSIFIER = "AutoModelForSequenceClassification"
NO_HEAD = {"without": ("classifier",)}


@pytest.mark.parametrize(
    "changes, settings, missing",
    [
        ({}, {"task_type": None, **NO_HEAD}, "classifier.weight"),
        ({}, {"task_type": None, "without": ("classifier", "pooler")}, "pooler.dense.weight"),
        ({}, {"without": ("classifier", "pooler")}, "pooler.dense.weight"),
        (
            {},
            {"task_type": None, "modules_to_save": ["pooler"], "without": ("classifier", "pooler")},
            "classifier.weight",
        ),
        ({"model_type": "roberta"}, {"task_type": None, **NO_HEAD}, "classifier.dense.weight"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_a_tensor_of_the_head_that_neither_adapter_nor_base_has_is_an_error(
    changes, settings, missing, with_config, their_folder, folders
):
    _, tuned = folders
    model = base_model(pad_token_id=1, **changes)
    their_folder(model, CLASSIFIER, **settings)
    if with_config:
        (tuned / "config.json").write_text(json.dumps(model.config.to_dict()))
    with pytest.raises(InputError, match=f"adapter_model.safetensors: tensor '{missing}' is missing") as error:
        load_checkpoint(tuned)
    assert str(tuned) in str(error.value) and "\n" not in str(error.value)


def test_a_head_that_the_base_has_for_other_classes_than_the_adapters_is_missing(their_folder, folders):
    _, tuned = folders
    their_folder(base_model(), CLASSIFIER, task_type=None, labels=2)
    config = TINY.with_head("classification", ("yes", "no"))
    (tuned / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(InputError, match="tensor 'classifier.weight' is missing, here and in the base model"):
        load_checkpoint(tuned)


@pytest.mark.parametrize("peft", SETTINGS, ids=lambda peft: peft.method)
def test_a_base_that_has_lost_its_pooler_is_an_error_that_names_it(peft, poolerless, folders):
    _, tuned = folders
    save_peft(train(base_model(), peft), tuned, peft, str(poolerless))
    with pytest.raises(
        InputError, match="trained.safetensors: tensor 'pooler.dense.weight' is missing, here and in the"
    ):
        load_tuned(tuned, poolerless, tuned_config(tuned, poolerless))


@pytest.mark.parametrize("modules", [None, ["pooler"], ["classifier"], ["pooler", "classifier"]], ids=str)
def test_what_of_the_head_an_adapter_leaves_out_is_the_bases(modules, their_folder, folders):
    twin = their_folder(base_model(), CLASSIFIER, task_type=None, modules_to_save=modules)
    checkpoint = load_checkpoint(folders[1])
    assert checkpoint.model.config.labels == ("a", "b", "c")
    torch.testing.assert_close(logits(checkpoint.model), their_logits(twin, TINY), atol=1e-5, rtol=1e-5)


def test_a_module_that_the_adapter_says_it_saved_and_has_not_is_missing_though_the_base_has_one(their_folder, folders):
    _, tuned = folders
    their_folder(base_model(), CLASSIFIER)
    rewrite(tuned / "adapter_model.safetensors", lambda t: [t.pop(key) for key in list(t) if "classifier" in key])
    with pytest.raises(InputError, match="tensor 'classifier.bias' is missing"):
        load_checkpoint(tuned)


@pytest.mark.parametrize(
    "changes, name, settings, labels",
    [
        ({"head": None}, CLASSIFIER, {"labels": 4}, tuple(f"LABEL_{i}" for i in range(4))),
        ({}, CLASSIFIER, {}, ("a", "b", "c")),
        ({}, CLASSIFIER, {"labels": 2}, ("LABEL_0", "LABEL_1")),
        ({"model_type": "roberta"}, CLASSIFIER, {"labels": 5}, tuple(f"LABEL_{i}" for i in range(5))),
        (
            {"head": None},
            CLASSIFIER,
            {"task_type": None, "modules_to_save": ["classifier"]},
            tuple(f"LABEL_{i}" for i in range(3)),
        ),
        ({"head": "regression"}, CLASSIFIER, {}, ("LABEL_0",)),
        ({"head": "question-answering"}, "AutoModelForQuestionAnswering", {"task_type": "QUESTION_ANS"}, ()),
        ({"head": None}, "AutoModelForQuestionAnswering", {"task_type": "QUESTION_ANS", "labels": 2}, ()),
        ({}, "AutoModelForQuestionAnswering", {"task_type": None, "modules_to_save": ["qa_outputs"], "labels": 2}, ()),
    ],
)
def test_a_folder_of_peft_without_config_json_has_the_head_that_transformers_gives_it(
    changes, name, settings, labels, their_folder, folders, vocabulary
):
    _, tuned = folders
    model = base_model(**{"pad_token_id": 1, "head": "classification", **changes})
    if model.config.head is None:  # its file has no pooler, and transformers would draw one
        model = under_head(model, "classification", ("a", "b", "c"))
        settings = {**settings, "without": ("classifier",)}
    twin = their_folder(model, name, **settings)
    if changes.get("head", "") is None:
        edit(folders[0] / "config.json", architectures=["BertModel"], problem_type=None, id2label=None)
    assert not (tuned / "config.json").exists() and not (tuned / "vocab.txt").exists()
    checkpoint = load_checkpoint(tuned)
    config = checkpoint.model.config
    torch.testing.assert_close(logits(checkpoint.model), their_logits(twin, config), atol=1e-5, rtol=1e-5)
    assert checkpoint.tokenizer.source.parent == folders[0]
    if name == CLASSIFIER:
        assert config.head == ("regression" if len(labels) == 1 else "classification") and config.labels == labels
    else:
        assert config.head == "question-answering"


def test_a_folder_of_ours_without_its_config_json_is_an_error(folders, vocabulary):
    base, tuned = folders
    for peft in (LORA, PeftConfig("bitfit")):
        save_pretrained(base_model(), base)
        save_peft(train(base_model(), peft), tuned, peft, str(base))
        (tuned / "config.json").unlink()
        with pytest.raises(InputError, match="config.json: cannot be read"):
            load_checkpoint(tuned)
        shutil.rmtree(tuned)
        tuned.mkdir()


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"r": 4, "init_lora_weights": "orthogonal"}], ids=str)
def test_rank_stabilised_lora_and_other_starts_have_pefts_logits(model_type, settings, their_folder, folders):
    twin = their_folder(base_model(model_type=model_type, pad_token_id=1), CLASSIFIER, **settings)
    checkpoint = load_checkpoint(folders[1])
    expected = their_logits(twin, checkpoint.model.config)
    torch.testing.assert_close(logits(checkpoint.model), expected, atol=1e-5, rtol=1e-5)
    merge(checkpoint.model)
    torch.testing.assert_close(logits(checkpoint.model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("LoraConfig", {"use_dora": True}, "key 'use_dora' changes what LoRA computes"),
        ("LoraConfig", {"rank_pattern": {"value": 2}}, "key 'rank_pattern'"),
        ("LoraConfig", {"alpha_pattern": {"value": 2}}, "key 'alpha_pattern'"),
        ("LoraConfig", {"layers_to_transform": [1]}, "key 'layers_to_transform'"),
        ("LoraConfig", {"bias": "lora_only"}, "key 'bias'"),
        ("LoraConfig", {"task_type": "TOKEN_CLS"}, "key 'task_type' must be one of .*SEQ_CLS, .*, got 'TOKEN_CLS'"),
        ("IA3Config", {"feedforward_modules": []}, "key 'peft_type' must be 'LORA', got 'IA3'"),
        ("PromptTuningConfig", {"num_virtual_tokens": 2}, "key 'peft_type' must be 'LORA', got 'PROMPT_TUNING'"),
        ("VeraConfig", {"r": 2}, "key 'peft_type' must be 'LORA', got 'VERA'"),
    ],
)
def test_what_peft_writes_of_other_methods_is_refused_by_name(method, settings, message, their_folder, folders):
    peft, _ = pytest.importorskip("peft"), folders

    def config(**values):
        kept = ("task_type", "target_modules") if method != "PromptTuningConfig" else ("task_type",)
        kept = values if method == "LoraConfig" else {key: values[key] for key in (*kept, *settings)}
        return getattr(peft, method)(**kept)

    name = "AutoModelForTokenClassification" if settings.get("task_type") == "TOKEN_CLS" else CLASSIFIER
    their_folder(base_model(), name, config=config, **settings)
    with pytest.raises(InputError, match=f"adapter_config.json: {message}"):
        load_checkpoint(folders[1])


def test_an_adapter_of_a_class_with_another_head_is_refused_without_a_task_type(their_folder, folders):
    their_folder(base_model(), "AutoModelForTokenClassification", task_type=None, modules_to_save=["classifier"])
    with pytest.raises(InputError, match="key 'auto_mapping' must be one of .*, got 'BertForTokenClassification'"):
        load_checkpoint(folders[1])


def test_an_adapter_that_is_a_pickle_is_refused(their_folder, folders):
    their_folder(base_model(), CLASSIFIER)
    (folders[1] / "adapter_model.safetensors").rename(folders[1] / "adapter_model.bin")
    with pytest.raises(InputError, match="no adapter_model.safetensors .adapter_model.bin is a pickle, which is never"):
        load_checkpoint(folders[1])


# Where the base is


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, vocabulary):
    """huggingface_hub's cache with org/base at two revisions, `main` and `v1`, of other weights; no network."""
    constants = pytest.importorskip("huggingface_hub").constants
    cache = tmp_path / "hub"
    repository = cache / "models--org--base"
    (repository / "refs").mkdir(parents=True)
    models = {"main": base_model(), "v1": base_model()}
    with torch.no_grad():
        models["main"].embeddings.word_embeddings.weight.mul_(-1)
    for revision, sha in (("main", "0" * 40), ("v1", "1" * 40)):
        folder = repository / "snapshots" / sha
        folder.mkdir(parents=True)
        save_pretrained(models[revision], folder)
        (folder / "vocab.txt").write_text(vocabulary)
        (repository / "refs" / revision).write_text(sha)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_the_revision_of_the_base_that_peft_writes_is_the_one_that_is_loaded(hub_cache, their_folder, folders):
    _, tuned = folders
    twin = their_folder(base_model(), CLASSIFIER, revision="v1")
    edit(tuned / "adapter_config.json", base_model_name_or_path="org/base")
    assert base_model_name(tuned)[:2] == ("org/base", "v1")
    expected = their_logits(twin, TINY)
    torch.testing.assert_close(logits(load_checkpoint(tuned).model), expected, atol=1e-5, rtol=1e-5)
    edit(tuned / "adapter_config.json", revision=None)  # then it is main's, which is another model
    assert not torch.allclose(logits(load_checkpoint(tuned).model), expected, atol=1e-2)
    for revision, message in (("v2", "'org/base@v2'"), (7, "key 'revision' must be")):
        edit(tuned / "adapter_config.json", revision=revision)
        with pytest.raises(InputError, match=message):
            load_checkpoint(tuned)


@pytest.mark.parametrize("peft", [LORA, PeftConfig("bitfit")], ids=lambda peft: peft.method)
def test_the_revision_is_written_apart_from_the_name_and_read_again_here_and_by_peft(peft, hub_cache, folders):
    library = pytest.importorskip("peft")
    _, tuned = folders
    model = train(base_model(), peft)
    expected = logits(model)
    write_model(model, tuned, TrainConfig(peft=peft), "org/base@v1", merge=False, fresh=())
    assert base_model_name(tuned)[:2] == ("org/base", "v1")
    torch.testing.assert_close(logits(load_checkpoint(tuned).model), expected, atol=0, rtol=0)
    if peft.method == "lora":
        load = library.AutoPeftModelForSequenceClassification.from_pretrained
        twin = load(tuned, cache_dir=hub_cache, local_files_only=True, num_labels=3)
        torch.testing.assert_close(their_logits(twin, TINY), expected, atol=1e-5, rtol=1e-5)


def test_a_base_at_an_old_revision_that_stands_in_its_name_is_still_found(hub_cache, folders):
    _, tuned = folders
    save_peft(train(base_model(), LORA), tuned, LORA, "org/base@v1")
    edit(tuned / "adapter_config.json", revision=None)
    assert torch.equal(logits(load_checkpoint(tuned).model), logits(train(base_model(), LORA)))


@pytest.fixture
def moved(folders, vocabulary, monkeypatch):
    """What a method trained, of which the base has moved: a function of the method that returns where it is now."""
    base, tuned = folders

    def make(peft: PeftConfig):
        save_pretrained(base_model(), base)
        (base / "vocab.txt").write_text(vocabulary)
        write_model(train(base_model(), peft), tuned, TrainConfig(peft=peft), f"{base}/", merge=False, fresh=())
        return base.rename(base.with_name("moved"))

    return make


@pytest.mark.parametrize("peft", [LORA, *SETTINGS[1:5:2]], ids=lambda peft: peft.method)
def test_a_base_that_has_moved_is_named_with_file_and_key_and_may_be_given(peft, moved, folders):
    base, tuned = folders
    place = moved(peft)
    key = "adapter_config.json: key 'base_model_name_or_path'" if peft == LORA else "trained.json: key 'base_model'"
    with pytest.raises(InputError, match=f"{key} '{base}': no such folder; .* give --base-model$") as error:
        load_checkpoint(tuned)
    assert str(tuned) in str(error.value) and "--model" not in str(error.value)
    expected = logits(train(base_model(), peft))
    for name in (str(place), f"{place}/"):
        assert torch.equal(logits(load_checkpoint(tuned, base_model=name).model), expected)
    with pytest.raises(InputError, match="^--base-model '.*gone': no such folder"):
        load_checkpoint(tuned, base_model=str(base.with_name("gone")))
    with pytest.raises(
        InputError, match="^--base-model '.*tuned': is no whole model: .* says what was trained beside one"
    ):
        load_checkpoint(tuned, base_model=str(tuned))
    rewrite(place / "model.safetensors", lambda t: t["bert.embeddings.LayerNorm.weight"].add_(1))
    with pytest.raises(InputError, match="another base model: .* SHA-256 .*, those of the given base"):
        load_checkpoint(tuned, base_model=str(place))


def test_a_base_without_a_name_and_an_adapter_whose_base_is_a_link_or_relative(moved, folders, monkeypatch):
    base, tuned = folders
    place = moved(LORA)
    expected = logits(train(base_model(), LORA))
    edit(tuned / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(InputError, match="key 'base_model_name_or_path' must name the base model, got None"):
        load_checkpoint(tuned)
    assert torch.equal(logits(load_checkpoint(tuned, base_model=str(place)).model), expected)
    base.symlink_to(place)
    edit(tuned / "adapter_config.json", base_model_name_or_path=str(base), revision="of no meaning for a folder")
    assert torch.equal(logits(load_checkpoint(tuned).model), expected)
    monkeypatch.chdir(base.parent)  # transformers too reads a relative name from where one is
    edit(tuned / "adapter_config.json", base_model_name_or_path="./base")
    assert torch.equal(logits(load_checkpoint(tuned).model), expected)


def test_a_whole_model_has_no_base_to_be_given(folders):
    base, _ = folders
    save_pretrained(base_model(), base)
    with pytest.raises(
        InputError, match="--base-model is for what a PEFT method trained, and --checkpoint .*base is a"
    ):
        load_checkpoint(base, base_model="org/base")
