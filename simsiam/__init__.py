"""SimSiam (Chen & He, arXiv 2011.10566) as a library. Each room imports only those before it:

batchnorm, ranks, files, lock, network, images, folders, textures, views, recipes, loader, shards,
datasets, metrics, monitor, progress, devices, serialization, checkpoint, layouts, exports, weights,
run, lettering, figures, pictures.
"""
