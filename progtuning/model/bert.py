"""Encoders in plain PyTorch: BERT (Devlin et al. 2019, arXiv 1810.04805), RoBERTa (Liu et al. 2019, arXiv 1907.11692).

XLM-RoBERTa (Conneau et al. 2020, arXiv 1911.02116) and CamemBERT (Martin et al. 2020, arXiv 1911.03894) are RoBERTa.
DistilBERT (Sanh et al. 2019, arXiv 1910.01108) and ELECTRA (Clark et al. 2020, arXiv 2003.10555) are BERT with other
heads; DistilBERT without token types and dropout of attention's output, a small ELECTRA with narrower embeddings.

    M = E . B1 ... BL . H      Model = embeddings, encoder (L blocks), head

    B  batch    S  sequence    D  hidden_size    H  heads    F  intermediate_size    C  num_outputs

The modules carry the names that Hugging Face checkpoints of BERT give their tensors, so `state_dict` needs no table of
names: the keys of a file are these, under a prefix (`config.FAMILIES`) for embeddings, encoder and pooler. What another
family calls otherwise is said in its row. The file reads from the inside outwards: attention, block, encoder,
embeddings, model; the heads stand in `heads`. Nothing here knows of stages, cuts or fine-tuning methods: the encoder
offers a run over a range of its blocks, and modules can be wrapped from outside.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from progtuning.model.config import BertConfig
from progtuning.model.heads import CLASSES

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(D/H)) V for each of the H heads, with dropout on the attention probabilities."""

    attend = staticmethod(F.scaled_dot_product_attention)  # an instance may be given another kernel

    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, S, D) -> (B, H, S, D/H)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (self.split_heads(project(x)) for project in (self.query, self.key, self.value))
        dropout_prob = self.dropout_prob if self.training else 0.0
        # (B, H, S, D/H) x (B, H, D/H, S) -> (B, H, S, S);  (B, H, S, S) x (B, H, S, D/H) -> (B, H, S, D/H)
        context = self.attend(query, key, value, attn_mask=mask, dropout_p=dropout_prob)
        return context.transpose(1, 2).flatten(2)  # (B, H, S, D/H) -> (B, S, D)


class Output(nn.Module):
    """How both halves of a block end: projection to D, dropout, residual sum, LayerNorm (after the sum, as in BERT)."""

    def __init__(self, config: BertConfig, in_features: int, dropout_prob: float):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.dropout = nn.Dropout(dropout_prob)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    """Self-attention and its output: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config, config.hidden_size, config.attention_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.output(self.self(x, mask), residual=x)


class Intermediate(nn.Module):
    """The widening half of the feed-forward network: (B, S, D) -> (B, S, F)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class Block(nn.Module):
    """One Transformer block: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size, config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), residual=x)


class Encoder(nn.Module):
    """B1 ... BL. A caller may run any range of the blocks."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None, blocks: range | None = None) -> Tensor:
        """Run the blocks of `blocks` (0-based; all where None) over x (B, S, D).

        `mask` (B, S) bool is True at real tokens and False at padding; None says that there is no padding.
        """
        if mask is not None:
            mask = mask[:, None, None, :]  # (B, S) -> (B, 1, 1, S): the same keys for every head and query
        for index in range(len(self.layer)) if blocks is None else blocks:
            x = self.layer[index](x, mask)
        return x


class Embeddings(nn.Module):
    """E: word, position and token type embeddings, summed, then LayerNorm and dropout: (B, S) int64 -> (B, S, D).

    DistilBERT has no token types. The tables of a small ELECTRA have fewer columns than D, and a projection follows.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        pad, width = config.pad_token_id, config.embedding_width
        self.first_position = config.first_position
        self.pad_token_id = pad
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=pad)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, width, padding_idx=pad if self.first_position else None
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.project = nn.Linear(width, config.hidden_size) if width != config.hidden_size else None

    def position_ids(self, input_ids: Tensor) -> Tensor:
        if self.first_position == 0:  # BERT: 0, 1, 2, ...
            return torch.arange(input_ids.shape[1], device=input_ids.device)
        real = (input_ids != self.pad_token_id).long()  # RoBERTa: real tokens count from pad + 1, padding stays at pad
        return real.cumsum(dim=1) * real + self.pad_token_id

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        x = self.word_embeddings(input_ids)
        if self.token_type_embeddings is not None:
            x = x + self.token_type_embeddings(
                torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            )
        x = x + self.position_embeddings(self.position_ids(input_ids))
        x = self.dropout(self.LayerNorm(x))
        return x if self.project is None else self.project(x)


class Model(nn.Module):
    """M: embeddings, encoder and the head that `config.head` names; without one it returns the last hidden states."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        layers = CLASSES[config.head].layers(config) if config.head else {}
        for name, layer in layers.items():
            self.add_module(name, layer)

    @property
    def num_blocks(self) -> int:
        return len(self.encoder.layer)

    def head(self, x: Tensor) -> Tensor:
        """H: (B, S, D) -> (B, C) for classification and regression, (B, S, 2) for question answering.

        The two outputs of a token are its start and end logits.
        """
        return CLASSES[self.config.head].forward(self, x) if self.config.head else x

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return the head's output.

        It takes input_ids (B, S) int64, token_type_ids (B, S) int64 (None: zeros; DistilBERT has no types) and
        attention_mask (B, S) bool, True at real tokens (None: no padding).
        """
        x = self.embeddings(input_ids, token_type_ids)
        return self.head(self.encoder(x, attention_mask))


def build_model(config: BertConfig, seed: int = 0) -> Model:
    """Build a model with BERT's initial weights.

    They are normal(0, initializer_range), with zero biases, LayerNorm 1 and 0, and a zero padding row. They depend on
    `seed` alone; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(config)
        initialize(model, config.initializer_range)
    return model


def initialize(module: nn.Module, initializer_range: float) -> None:
    """Draw the initial weights of every layer inside `module` (Devlin et al. 2019), in place."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.normal_(layer.weight, std=initializer_range)
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            with torch.no_grad():
                layer.weight[layer.padding_idx].zero_()
