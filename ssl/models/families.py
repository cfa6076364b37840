"""The families that no maintained library has; importing this module registers them with timm."""

from ssl.models import cbam_resnet, hardnet

__all__ = ["cbam_resnet", "hardnet"]
