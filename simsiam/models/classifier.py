"""A linear classifier on a backbone: the model of linear evaluation and fine-tuning."""

from torch import Tensor, nn

from simsiam.models.backbones import input_channels


def linear_head(features: int, classes: int) -> nn.Linear:
    """Build a linear head, initialised as in the authors' code: weight ~ N(0, 0.01), bias 0."""
    head = nn.Linear(features, classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


class Classifier(nn.Module):
    """A backbone and a linear head on its pooled features: N x C x H x W -> logits, N x classes."""

    def __init__(self, backbone: nn.Module, features: int, classes: int):
        super().__init__()
        self.backbone, self.features, self.channels = backbone, features, input_channels(backbone)
        self.fc = linear_head(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))
