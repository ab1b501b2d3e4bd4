"""Metrics, one a file: images -> features -> statistics -> value.

features.py       FeatureExtractor, EfficientNet-Lite0 features, cache     efficientnet.py  the network itself
frechet.py        Fréchet distance                                         colour.py        Lab histograms
probe.py          reads article type, colour group, gender off a photo     controls.py      hands out photos
image_quality.py  PSNR, SSIM, perceptual distance, sharpness of a reconstruction
"""
