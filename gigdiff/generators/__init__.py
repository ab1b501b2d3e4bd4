"""Image generators: one request, one result and one protocol for diffusion, GAN, VAE and any diffusers pipeline.

request.py    GenerationRequest, GenerationResult, Capabilities, ImageGenerator, validate
loading.py    load(name | folder | hub id) -> ImageGenerator
diffusion.py  DiffusionGenerator (the embedded layout), PipelineGenerator (any other diffusers folder)
one_pass.py   OnePassGenerator: GANs and VAEs
"""
