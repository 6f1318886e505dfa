"""The commands of `resnet-fused`, one file each, and what they share."""
