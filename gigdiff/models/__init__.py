"""One architecture a file. Models know nothing of data, configs or training.

The UNet is diffusers' own `UNet2DConditionModel`; what diffusers has no good small counterpart of is here.
"""
