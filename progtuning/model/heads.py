"""Heads: what follows the last block, and the loss by which it is trained. One class for each row of `config.HEADS`.

    B  batch    S  sequence    D  hidden_size    C  num_outputs

A head has no state: its layers are the model's own, under the names that Hugging Face checkpoints give them.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from progtuning.model.config import BertConfig


class Pooler(nn.Module):
    """tanh(W x + b) of the first token, [CLS]: (B, S, D) -> (B, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class Classifier(nn.Module):
    """The classification head of families without a pooler, with a dense layer in its place: (B, S, D) -> (B, C).

    RoBERTa's has tanh after that layer, ELECTRA's GELU, DistilBERT's ReLU and no dropout of what it reads.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu}[config.family.head_act]
        self.dropout = nn.Dropout(config.head_dropout_prob)
        self.drops_out_input = config.family.drops_out_head_input
        self.out_proj = nn.Linear(config.hidden_size, config.num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]  # (B, S, D) -> (B, D)
        x = self.dense(self.dropout(x) if self.drops_out_input else x)
        return self.out_proj(self.dropout(self.activation(x)))


class Classification:
    """A class for each sequence."""

    @staticmethod
    def layers(config: BertConfig) -> dict[str, nn.Module]:
        """Return the head's layers by their names, in the order in which their weights are drawn."""
        if not config.has_pooler:
            return {"classifier": Classifier(config)}
        return {
            "pooler": Pooler(config),
            "dropout": nn.Dropout(config.head_dropout_prob),
            "classifier": nn.Linear(config.hidden_size, config.num_outputs),
        }

    @staticmethod
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        """Apply the layers, which are attributes of `model`: (B, S, D) -> (B, C)."""
        if model.config.has_pooler:
            x = model.dropout(model.pooler(x))  # (B, S, D) -> (B, D)
        return model.classifier(x)

    @staticmethod
    def loss(
        outputs: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Return the mean over the batch, (), of outputs (B, C) and labels (B,) int64.

        `mask` (B, S) bool is True at real tokens (None: no padding). With `class_weights` (C,) a row counts in the mean
        as its class does; `label_smoothing` moves that share of a label to all classes evenly.
        """
        return F.cross_entropy(outputs, labels, class_weights, label_smoothing=label_smoothing)


class Regression(Classification):
    """A number for each sequence: the layers are those of one class."""

    @staticmethod
    def loss(outputs: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean square error, (), of outputs (B, 1) and labels (B,) float."""
        return F.mse_loss(outputs.squeeze(-1), labels)


class MultiLabel(Classification):
    """Any number of the classes for each sequence: the layers are those of classification."""

    @staticmethod
    def loss(outputs: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean binary cross-entropy, (), of logits and labels 0 or 1, both (B, C) float."""
        return F.binary_cross_entropy_with_logits(outputs, labels)


class QuestionAnswering:
    """Logits of an answer's start and end for each token."""

    @staticmethod
    def layers(config: BertConfig) -> dict[str, nn.Module]:
        """As of Classification."""
        return {
            "dropout": nn.Dropout(config.head_dropout_prob),
            "qa_outputs": nn.Linear(config.hidden_size, config.num_outputs),
        }

    @staticmethod
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        """Apply the layers: (B, S, D) -> (B, S, 2)."""
        return model.qa_outputs(model.dropout(x))

    @staticmethod
    def loss(outputs: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean loss, (), of start and end, each a class among S positions: of outputs (B, S, 2) and labels
        (B, 2) int64.

        No answer begins or ends in padding. google-research/bert and transformers let it take part in the softmax over
        positions; here it does not, so that a loss depends neither on how far a batch is padded nor on a cache, which
        keeps no states of padding.
        """
        if mask is not None:
            outputs = outputs.masked_fill(~mask[..., None], -math.inf)  # (B, S, 2)
        return F.cross_entropy(outputs, labels)


CLASSES = {
    "classification": Classification,
    "regression": Regression,
    "multi-label": MultiLabel,
    "question-answering": QuestionAnswering,
}
