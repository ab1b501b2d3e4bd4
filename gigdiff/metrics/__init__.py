"""Metrics, one a file: images -> features -> statistics -> value.

extractors    features.py          FeatureExtractor, EfficientNet-Lite0 features, cache; efficientnet.py the network
              inception.py         InceptionV3 as FID uses it
              vision.py            DINOv2 and CLIP
              colour.py            Lab histograms of the foreground
sets          frechet.py           Fréchet distance; frechet_infinite.py at infinitely many images
              kernel.py            kernel distance
              manifold.py          precision, recall, density, coverage
              inception_score.py   Inception Score
              diversity.py         pairwise diversity, Vendi score
              copies.py            nearest train photo
prompts       probe.py             reads article type, colour group, gender off a photo
              colour_difference.py how far from the named colour, by ciede2000.py
              alignment.py         CLIP score
controls      controls.py          hands out photos
              image_quality.py     what a reconstruction loses
"""
