"""Hugging Face safetensors in and out, against transformers and against damaged files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from progtuning.base.errors import InputError
from progtuning.base.sources import model_folder
from progtuning.cli.plan import architecture
from progtuning.model.bert import ACTIVATIONS, build_model
from progtuning.model.config import FAMILIES, BertConfig
from progtuning.model.weights import load_model, save_pretrained
from tests.models import TINY, tiny_batch, tiny_model
from tests.test_bert import HF_CLASSES

SAVED_CLASS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "multi-label": "AutoModelForSequenceClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}


@pytest.fixture
def model():
    return tiny_model().eval()


@pytest.fixture
def folder(model, tmp_path):
    """A model folder whose keys stand under `bert.`, as save_pretrained writes it."""
    save_pretrained(model, tmp_path)
    return tmp_path


def rewrite(folder, change, **metadata):
    """Pass the tensors of a folder's file through `change` and write them again."""
    path = folder / "model.safetensors"
    tensors = {key: t.contiguous() for key, t in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt", **metadata})


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("head", sorted(SAVED_CLASS))
def test_transformers_loads_what_is_saved_with_equal_logits(model_type, head, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = replace(TINY, model_type=model_type, pad_token_id=1).with_head(head, ("sad", "glad"))
    model = build_model(config, seed=3).eval()
    save_pretrained(model, tmp_path)
    twin, info = getattr(transformers, SAVED_CLASS[head]).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = tiny_batch(config)
    with torch.no_grad():
        theirs = twin.eval()(**{key: value.long() for key, value in batch.items()})
        ours = model(**batch)
    if head == "question-answering":
        real = batch["attention_mask"]
        logits = torch.stack((theirs.start_logits, theirs.end_logits), -1)
        torch.testing.assert_close(ours[real], logits[real], atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(ours, theirs.logits, atol=1e-5, rtol=0)
    if head == "classification":
        assert twin.config.id2label == {0: "sad", 1: "glad"}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"])
def test_what_transformers_saves_is_loaded_with_equal_hidden_states(model_type, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    name = HF_CLASSES[model_type]
    values = replace(TINY, model_type=model_type, pad_token_id=1).to_dict()
    for key in ("architectures", "model_type", "problem_type", "id2label", "label2id"):
        del values[key]
    twin = getattr(transformers, name + kind)(getattr(transformers, name + "Config")(**values)).eval()
    twin.save_pretrained(tmp_path)
    config = BertConfig.from_json(tmp_path / "config.json")
    heads = {"ForQuestionAnswering": "question-answering", "ForSequenceClassification": "classification"}
    assert config.head == heads.get(kind)
    model, report = load_model(tmp_path, config.with_head("question-answering"))
    assert set(report.fresh) == (set() if kind == "ForQuestionAnswering" else {"qa_outputs.weight", "qa_outputs.bias"})
    batch = tiny_batch(config)
    ours = model.encoder(model.embeddings(batch["input_ids"], batch["token_type_ids"]), batch["attention_mask"])
    base = twin if kind == "Model" else twin.base_model
    theirs = base(**{key: value.long() for key, value in batch.items()}).last_hidden_state
    torch.testing.assert_close(ours[batch["attention_mask"]], theirs[batch["attention_mask"]], atol=1e-5, rtol=0)


def test_a_round_trip_keeps_every_bit_and_the_config(model, folder):
    again, report = load_model(folder)
    assert_same_weights(again, model)
    assert again.config == model.config
    assert report.fresh == report.unused == ()


def without_prefix(tensors):
    return {key.removeprefix("bert."): t for key, t in tensors.items()}


def legacy_layer_norms(tensors):
    return {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for key, t in tensors.items()
    }


def wrapped(*prefixes):
    """Return a change that puts the prefixes before every key, and one that compiles each block alone."""

    def change(tensors):
        return {"".join(prefixes) + key.replace(".layer.1.", ".layer.1._orig_mod."): t for key, t in tensors.items()}

    return change


def with_stray_tensors(tensors):
    stray = {"cls.predictions.bias": torch.zeros(60), "bert.embeddings.position_ids": torch.arange(24)[None]}
    return tensors | stray


WRAPPED = [("module.",), ("_orig_mod.",), ("model.",), ("_orig_mod.", "module."), ("_fsdp_wrapped_module.",)]


@pytest.mark.parametrize(
    "change", [without_prefix, legacy_layer_norms, with_stray_tensors, *(wrapped(*names) for names in WRAPPED)]
)
def test_other_spellings_of_the_keys_load_the_same_weights(change, model, folder):
    rewrite(folder, change)
    again, report = load_model(folder)
    assert_same_weights(again, model)
    expected = {"cls.predictions.bias", "bert.embeddings.position_ids"} if change is with_stray_tensors else set()
    assert set(report.unused) == expected and report.fresh == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_float_types_are_read_as_fp32(dtype, model, folder):
    rewrite(folder, lambda tensors: {key: t.to(dtype) for key, t in tensors.items()})
    again, _ = load_model(folder)
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].to(dtype).float())


def shard(folder):
    """Divide a folder's file in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(sorted(tensors))}
    for place in set(places.values()):
        save_file({key: tensors[key] for key in places if places[key] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_shards_are_read_by_their_index(model, folder):
    shard(folder)
    assert_same_weights(load_model(folder)[0], model)


def test_a_shard_that_lacks_a_tensor_or_is_missing_is_an_error_that_names_it(folder):
    places = shard(folder)
    place = places["classifier.bias"]
    tensors = load_file(folder / place)
    del tensors["classifier.bias"]
    save_file(tensors, folder / place)
    with pytest.raises(InputError, match=f"{place}: tensor 'classifier.bias', which .* places here, is missing"):
        load_model(folder)
    (folder / place).unlink()
    with pytest.raises(InputError, match=place):
        load_model(folder)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", ""])
def test_a_shard_outside_the_folder_is_refused(place, folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"classifier.bias": place}}))
    with pytest.raises(InputError, match="must be the name of a file in the same folder"):
        load_model(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(text, folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match="expected an object 'weight_map'"):
        load_model(folder)


def test_a_fresh_head_is_drawn_from_the_seed_and_reported(folder):
    config = TINY.with_head("classification", tuple("abcde"))
    first, report = load_model(folder, config, seed=1)
    assert report.fresh == ("classifier.weight", "classifier.bias")
    assert set(report.unused) == {"classifier.weight", "classifier.bias"}
    again, other = (load_model(folder, config, seed=seed)[0] for seed in (1, 2))
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert first.classifier.weight.shape == (5, 16) and not first.classifier.bias.any()


def test_a_missing_head_is_an_error_where_a_fresh_one_would_be_wrong(folder):
    rewrite(folder, lambda tensors: {key: t for key, t in tensors.items() if not key.startswith("classifier")})
    assert load_model(folder)[1].fresh == ("classifier.weight", "classifier.bias")
    with pytest.raises(InputError, match="tensor 'classifier.weight' is missing"):
        load_model(folder, fresh_head=False)


def test_a_missing_encoder_tensor_is_an_error_that_names_it(folder):
    lost = "bert.encoder.layer.2.intermediate.dense.bias"
    rewrite(folder, lambda tensors: {key: t for key, t in tensors.items() if key != lost})
    with pytest.raises(InputError, match=r"tensor 'encoder\.layer\.2\.intermediate\.dense\.bias' is missing"):
        load_model(folder)


@pytest.mark.parametrize("prefix", ["encoder.", "roberta.", "0.auto_model.", "module.roberta."])
def test_a_foreign_prefix_is_an_error_and_never_a_fresh_encoder(prefix, folder):
    rewrite(folder, lambda tensors: {prefix + key.removeprefix("bert."): t for key, t in tensors.items()})
    with pytest.raises(InputError, match=f"is missing .*the first: {prefix}"):
        load_model(folder)


@pytest.mark.parametrize(
    "key",
    ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight", "bert.pooler.dense.weight"],
)
def test_a_wrong_shape_is_an_error_that_names_the_tensor_and_both_shapes(key, folder):
    rewrite(folder, lambda tensors: tensors | {key: tensors[key][:, :-1]})
    with pytest.raises(InputError, match=rf"tensor '{key}' has shape \[.*\], expected \[.*\]"):
        load_model(folder)


def test_a_tensor_that_is_no_float_is_an_error(folder):
    key = "bert.encoder.layer.0.output.dense.weight"
    rewrite(folder, lambda tensors: tensors | {key: tensors[key].to(torch.int8)})
    with pytest.raises(InputError, match="has dtype I8, expected one of F64, F32, F16, BF16"):
        load_model(folder)


def test_a_truncated_or_missing_file_is_an_error_that_names_it(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 8, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
            load_model(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle, which is never read"):
        load_model(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"position_embedding_type": "relative_key"}, "'position_embedding_type' changes what the model computes"),
        ({"is_decoder": True}, "'is_decoder' changes what the model computes"),
        ({"rotary_base": 10000}, "'rotary_base' is unknown"),
        ({"hidden_act": "silu"}, "hidden_act must be one of gelu, gelu_new, relu, got 'silu'"),
        ({"hidden_size": 15}, "hidden_size must be divisible by num_attention_heads, got 15 and 2"),
        ({"hidden_size": -16}, "hidden_size must be an integer in 1..16777216, got -16"),
        ({"hidden_size": "16"}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer in 1..1000"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a number"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob must be a number in 0..1"),
        ({"model_type": "gpt2"}, f"model_type must be one of {', '.join(FAMILIES)}, got 'gpt2'"),
        ({"model_type": ["bert"]}, "model_type must be one of"),
        ({"model_type": "distilbert"}, "key 'dim' is missing"),
        ({"embedding_size": 8}, "key 'embedding_size' is unknown"),
        ({"id2label": {"0": "a", "2": "b"}}, "'id2label' must map 0..1 to names"),
        ({"id2label": ["a", "b"]}, "'id2label' must map"),
        ({"problem_type": "ranking"}, "'ranking' is not supported, expected single_label_classification, regression"),
        (
            {"problem_type": "Regression"},
            "problem_type 'Regression' is not supported, expected single_label_classification, regression, multi_label",
        ),
        ({"problem_type": ["regression"]}, "problem_type ['regression'] is not supported"),
        ({"problem_type": "regression"}, "problem_type 'regression' is supported with one output, got 3"),
        ({"id2label": {"0": "a"}}, "'single_label_classification' is supported with two or more classes, got 1"),
        ({"id2label": {"0": "a", "1": "a"}}, "'id2label' must map to distinct names, got ['a', 'a']"),
        ({"adapters": {"adapters": {"a": "b"}}}, "key 'adapters' changes what the model computes"),
        ({"adapters_": {}}, "key 'adapters_' is unknown"),
        ({"sbert": 1}, "key 'sbert' is unknown"),
        ({"architectures": "BertModel"}, "'architectures' must be a list"),
    ],
)
def test_a_config_that_is_wrong_or_changes_the_mathematics_is_refused_by_file_and_key(change, message, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as error:
        load_model(folder)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)


FIRST_RELEASE = """
attention_probs_dropout_prob hidden_act hidden_dropout_prob hidden_size initializer_range intermediate_size
max_position_embeddings num_attention_heads num_hidden_layers type_vocab_size vocab_size
""".split()
SMALL = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


def test_a_config_of_berts_first_release_is_a_bert_as_transformers_reads_it(folder):
    """Neither model_type nor architectures: so SciBERT's, and the files that Google published."""
    transformers = pytest.importorskip("transformers")
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: values[key] for key in FIRST_RELEASE} | {"directionality": "bidi"}))
    config = BertConfig.from_json(path)
    assert (config.model_type, config.head, config.pad_token_id, config.layer_norm_eps) == ("bert", None, 0, 1e-12)
    model, _ = load_model(folder)
    batch = tiny_batch(config)
    with torch.no_grad():
        theirs = transformers.BertModel.from_pretrained(folder)(**{key: value.long() for key, value in batch.items()})
        ours = model(**batch)
    real = batch["attention_mask"]
    torch.testing.assert_close(ours[real], theirs.last_hidden_state[real], atol=1e-5, rtol=0)


OTHERS = {
    "RobertaPreLayerNorm": {},
    "Albert": {"embedding_size": 8},
    "MPNet": {},
    "RoFormer": {"embedding_size": 16},
    "MegatronBert": {},
}


@pytest.mark.parametrize("family", OTHERS)
def test_a_bare_encoder_of_another_family_is_never_taken_for_a_bert(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{family}Config")(**SMALL, **OTHERS[family], max_position_embeddings=24)
    getattr(transformers, f"{family}Model")(theirs).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in whole.items() if key != "model_type"}))
    with pytest.raises(InputError, match=f"config.json: architectures must name .* got '{family}Model'"):
        load_model(tmp_path)
    path.write_text(json.dumps({k: v for k, v in whole.items() if k not in ("model_type", "architectures")}))
    with pytest.raises(InputError, match="model_type|'embeddings.LayerNorm.weight' is missing"):
        load_model(tmp_path)
    bare = {key: whole.get(key, value) for key, value in TINY.to_dict().items() if key in FIRST_RELEASE}
    path.write_text(json.dumps({**bare, "type_vocab_size": 2}))
    with pytest.raises(InputError, match="as in a RoBERTa|is one of|is missing"):
        load_model(tmp_path)


def test_tensors_of_another_encoder_are_refused_and_blocks_above_those_of_the_model_are_not(model, folder):
    stray = "bert.encoder.layer.0.attention.self.distance_embedding.weight"
    edit = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(edit | {"num_hidden_layers": 2}))
    cut, report = load_model(folder)
    assert cut.num_blocks == 2 and {name.split(".")[3] for name in report.unused} == {"2", "3"}
    assert torch.equal(cut.encoder.layer[1].output.dense.weight, model.encoder.layer[1].output.dense.weight)
    rewrite(folder, lambda tensors: tensors | {stray: torch.zeros(3, 8)})
    with pytest.raises(InputError, match=f"tensor '{stray}' is none of a bert encoder"):
        load_model(folder)


def test_keys_of_other_libraries_are_passed_over_and_reported_with_or_without_a_byte_order_mark(model, folder):
    path = folder / "config.json"
    assert load_model(folder)[1].notes == ()
    keys = {
        "adapters": {"adapters": {}, "config_map": {}, "fusion_config_map": {}, "fusions": {}},
        "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
        "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "5.1.0"},
        "vocab_size_or_config_json_file": -1,
        "xla_device": None,
    }
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(json.loads(path.read_text()) | keys).encode())
    again, report = load_model(folder)
    assert_same_weights(again, model)
    assert again.config == model.config and report.passed_over == tuple(sorted(keys))
    assert report.notes == (f"Passed over in config.json, as no part of the model: {', '.join(sorted(keys))}.",)


def test_other_names_of_an_activation_compute_what_transformers_computes():
    activations = pytest.importorskip("transformers.activations").ACT2FN
    x = torch.linspace(-8, 8, 4001)
    refused = set()
    for name in activations:
        try:
            own = BertConfig.from_dict({**TINY.to_dict(), "hidden_act": name}).hidden_act
        except InputError:
            refused.add(name)
            continue
        torch.testing.assert_close(ACTIVATIONS[own](x), activations[name](x), atol=1e-6, rtol=1e-6)
    assert len(activations) - len(refused) == 8 and {"silu", "quick_gelu", "gelu_10"} <= refused


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
def test_a_config_without_a_size_is_refused(key, folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"key '{key}' is missing"):
        load_model(folder)


NOT_A_CONFIG = {
    "empty": b"",
    "cut": b"{",
    "list": b"[]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "long number": b'{"a": ' + b"1" * 10_000 + b"}",
    "surrogate": b"\xed\xa0\x80",
}


@pytest.mark.parametrize("kind", NOT_A_CONFIG)
def test_a_config_that_is_no_json_object_is_refused_in_one_line(kind, folder):
    (folder / "config.json").write_bytes(NOT_A_CONFIG[kind])
    with pytest.raises(InputError, match=r"config\.json: ") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_failed_save_leaves_the_old_file(model, folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("progtuning.model.weights.save_file", full_disk)
    with pytest.raises(RuntimeError, match="No space left on device"):
        save_pretrained(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("family", ["XLMRoberta", "Camembert", "DistilBert", "Electra"])
def test_an_encoder_of_a_family_is_known_by_its_architecture_and_without_one_not_taken_for_a_bert(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = SMALL if family != "DistilBert" else {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2}
    theirs = getattr(transformers, f"{family}Config")(**sizes, max_position_embeddings=24)
    getattr(transformers, f"{family}Model")(theirs).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in whole.items() if key != "model_type"}))
    assert load_model(tmp_path)[0].config.model_type == whole["model_type"]
    path.write_text(json.dumps({k: v for k, v in whole.items() if k not in ("model_type", "architectures")}))
    with pytest.raises(InputError, match="model_type"):
        load_model(tmp_path)
    bare = {key: whole.get(key, value) for key, value in TINY.to_dict().items() if key in FIRST_RELEASE}
    path.write_text(json.dumps({**bare, **SMALL, "hidden_act": "gelu"}))
    with pytest.raises(InputError, match="as in a RoBERTa|is one of"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 15}, "dim must be divisible by n_heads, got 15 and 2"),
        ({"n_layers": 0}, "n_layers must be an integer in 1..1000, got 0"),
        ({"seq_classif_dropout": 2}, "seq_classif_dropout must be a number in 0..1, got 2"),
        ({"activation": "silu"}, "activation must be one of gelu, gelu_new, relu, got 'silu'"),
        ({"type_vocab_size": 2}, "key 'type_vocab_size' is unknown"),
        ({"hidden_size": 16}, "key 'hidden_size' is unknown"),
    ],
)
def test_what_is_wrong_in_a_distilberts_config_is_named_by_its_own_keys(change, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(replace(TINY, model_type="distilbert").to_dict() | change))
    with pytest.raises(InputError) as error:
        BertConfig.from_json(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_field_that_a_family_does_not_have_cannot_be_set():
    with pytest.raises(InputError, match="type_vocab_size must be 0 for distilbert, got 3"):
        replace(TINY, model_type="distilbert", type_vocab_size=3)
    with pytest.raises(InputError, match="embedding_size must be None for bert, got 8"):
        replace(TINY, embedding_size=8)


def sentence_model(root, model, encoder: str) -> None:
    """Write a model of sentence-transformers: the encoder in the folder `encoder` of `root`, then pooling and norm."""
    (root / encoder).mkdir(exist_ok=True)
    save_pretrained(model, root / encoder)
    (root / encoder / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": false}')
    names = (("Transformer", encoder), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(names)
    ]
    (root / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize("encoder", ["", "0_Transformer"])
def test_of_a_sentence_transformers_folder_the_encoder_is_taken_and_what_is_left_is_said(encoder, model, tmp_path):
    sentence_model(tmp_path, model, encoder)
    folder = model_folder(str(tmp_path))
    assert folder == tmp_path / encoder
    again, report = load_model(folder)
    assert_same_weights(again, model)
    left = "1_Pooling (Pooling), 2_Normalize (Normalize), sentence_bert_config.json"
    assert report.notes == (f"Left of the sentence-transformers model, whose encoder is taken: {left}.",)
    assert architecture(str(tmp_path)).hidden_size == model.config.hidden_size


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda modules: {}, "expected a list of objects with a 'path' and a 'type'"),
        (lambda modules: [{"path": ""}], "expected a list of objects with a 'path' and a 'type'"),
        (lambda modules: modules[1:], "expected one module of type Transformer, got Pooling, Normalize"),
        (lambda modules: modules[:1] * 2, "expected one module of type Transformer, got Transformer, Transformer"),
        (lambda modules: [modules[0] | {"path": "../x"}], "'../x' of the Transformer must be the name of a folder"),
        (lambda modules: [modules[0] | {"path": ".."}], "'..' of the Transformer must be the name of a folder"),
        (lambda modules: [modules[0] | {"path": "1_T"}], "'1_T' of the Transformer must be the name of a folder"),
    ],
)
def test_a_modules_file_that_names_no_one_encoder_within_is_refused(change, message, model, tmp_path):
    sentence_model(tmp_path, model, "")
    path = tmp_path / "modules.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError) as error:
        model_folder(str(tmp_path))
    assert f"{path}: " in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
