"""The families that no maintained library has; importing this module registers them with timm."""
