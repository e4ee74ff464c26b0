"""How an answer comes of an image and its caption: by their logits, by their pooled features, or by places that look up
words. What each is given is said by `reads`; parameters lie under `fusion.` of the model, see fusion.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlc.models.label_attention import Attention

# How captions are mixed: int64 [B, K] samples of the micro-batch, float32 [B, K] the share of each, 1 in a row's sum.
TextMix = tuple[Tensor, Tensor]


def mixed(x: Tensor, mix: TextMix | None) -> Tensor:
    """[B, ...] -> the same shape: the sum of the rows `mix` names, each by its share."""
    if mix is None:
        return x
    index, share = mix
    return (x[index] * share.view(*share.shape, *(1,) * (x.ndim - 1))).sum(1)


class Concat(nn.Module):
    """W [x_i; x_c] + b of both parts' logits [B, C]: the concatenation of the report on SwinV2-L + BERT."""

    reads = "logits"

    def __init__(self, num_classes: int):
        super().__init__()
        self.linear = nn.Linear(2 * num_classes, num_classes)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.linear(torch.cat((image, text), 1))

    def last(self) -> tuple[Tensor, Tensor | None]:
        return self.linear.weight, self.linear.bias


class Bilinear(nn.Module):
    """x_i W_k x_c + b_k for each class k, of both parts' logits [B, C]: the bilinear layer of the same report."""

    reads = "logits"

    def __init__(self, num_classes: int):
        super().__init__()
        self.bilinear = nn.Bilinear(num_classes, num_classes, num_classes)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        # Autocast leaves the types of a bilinear product to its caller, and FSDP2 may hold the weight in bfloat16.
        return self.bilinear(*(x.to(self.bilinear.weight.dtype) for x in (image, text)))

    def last(self) -> tuple[Tensor, Tensor | None]:
        return self.bilinear.weight, self.bilinear.bias


class Late(nn.Module):
    """The logit of w sigmoid(x_i) + (1 - w) sigmoid(x_c), float32: the loss is that of the averaged probability.

    w is a buffer `share` [C], the image's share for each class, which is not trained: see mlc/metrics/combine.py.
    """

    reads = "logits"

    def __init__(self, num_classes: int, *, share: float = 0.5):
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"share {share} must be in 0..1")
        self.register_buffer("share", torch.full((num_classes,), float(share)))

    def forward(self, image: Tensor, text: Tensor, captioned: Tensor) -> Tensor:
        """captioned float [B, 1] in 0..1: what the text's share is multiplied by, 0 without a caption."""
        image, text = image.float(), text.float()
        of_text = (1 - self.share) * captioned
        log_i, log_t = (1 - of_text).log(), of_text.log()
        yes = torch.logaddexp(log_i + F.logsigmoid(image), log_t + F.logsigmoid(text))
        no = torch.logaddexp(log_i + F.logsigmoid(-image), log_t + F.logsigmoid(-text))
        return yes - no


class Early(nn.Module):
    """Pooled features, each projected to `width`, batch norm and ReLU, side by side into a layer of `hidden`: as in
    the works on EfficientNet + ALBERT and on ResNeXt50 + BiGRU, whose width is 256.

    norm: the batch norms, which the second work's ablation leaves out. hidden: 0 for none, one linear classifier.
    """

    reads = "features"

    def __init__(
        self,
        image_features: int,
        text_features: int,
        num_classes: int,
        *,
        width: int = 256,
        hidden: int = 256,
        norm: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.image, self.text = _projection(image_features, width, norm), _projection(text_features, width, norm)
        self.mlp = nn.Sequential(nn.Linear(2 * width, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden or 2 * width, num_classes)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.classifier(self.drop(self.mlp(torch.cat((self.image(image), self.text(text)), 1))))

    def last(self) -> tuple[Tensor, Tensor | None]:
        return self.classifier.weight, self.classifier.bias


def _projection(features: int, width: int, norm: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.ReLU())


class Gated(nn.Module):
    """Arevalo et al. 2017, "Gated Multimodal Units": z tanh(W_i x_i) + (1 - z) tanh(W_t x_t), z = sigmoid(W_z [x_i;
    x_t]), of pooled features; the classifier on it is linear."""

    reads = "features"

    def __init__(
        self, image_features: int, text_features: int, num_classes: int, *, width: int = 256, dropout: float = 0.0
    ):
        super().__init__()
        self.image, self.text = (nn.Linear(n, width, bias=False) for n in (image_features, text_features))
        self.gate = nn.Linear(image_features + text_features, width, bias=False)
        self.drop = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        z = self.gate(torch.cat((image, text), 1)).sigmoid()
        return self.classifier(self.drop(z * self.image(image).tanh() + (1 - z) * self.text(text).tanh()))

    def last(self) -> tuple[Tensor, Tensor | None]:
        return self.classifier.weight, self.classifier.bias


class CrossAttention(nn.Module):
    """Each place of the image's map attends to the words; what it finds is added to it, then an MLP, and the mean over
    places is classified. Norms come before attention and MLP.

    width: of places, words and attention, a multiple of `heads`; hidden: of the MLP.
    """

    reads = "places"

    def __init__(
        self,
        image_features: int,
        text_features: int,
        num_classes: int,
        *,
        width: int = 256,
        heads: int = 8,
        hidden: int = 512,
        dropout: float = 0.1,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of heads, {heads}")
        self.image, self.text = nn.Linear(image_features, width), nn.Linear(text_features, width)
        self.norm1, self.norm_text, self.norm2, self.norm = (nn.LayerNorm(width) for _ in range(4))
        self.attention = Attention(width, heads, dropout)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, places: Tensor, words: Tensor, mask: Tensor, mix: TextMix | None = None) -> Tensor:
        """places [B, H, W, D]; words [B, L, D'] and mask bool [B, L]. With `mix`, places look up the words of every
        caption that is in the mix, and what they find is mixed: sequences of words have no mean."""
        x = self.image(places.flatten(1, 2))
        q, words = self.norm1(x), self.norm_text(self.text(words))
        if mix is None:
            found = self.attention(q, words, words, mask)
        else:
            found = sum(
                share.view(-1, 1, 1) * self.attention(q, words[index], words[index], mask[index])
                for index, share in zip(*(part.unbind(1) for part in mix), strict=True)
            )
        x = x + self.drop(found.to(x.dtype))
        x = x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))
        return self.classifier(self.drop(self.norm(x).mean(1)))

    def last(self) -> tuple[Tensor, Tensor | None]:
        return self.classifier.weight, self.classifier.bias
