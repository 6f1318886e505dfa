"""`python -m resnet_fused` is `resnet-fused`."""

from .cli import main

main(prog_name="resnet-fused")
