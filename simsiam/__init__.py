"""SimSiam (Chen & He, arXiv 2011.10566) as a library. Each room imports only those before it:

ranks, files, lock, network, images, folders, textures, views, loader, shards, datasets, metrics,
monitor, devices, serialization, checkpoint, layouts, exports, weights, run, lettering,
figures, pictures.
"""
