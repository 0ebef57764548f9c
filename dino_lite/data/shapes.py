"""The embedded data set: drawn pictures of ten kinds, made in a second on any machine, from a seed.

It exists so that a first run shows self-supervision at work. Some kinds are patterns that fill the picture, some are
objects strewn over it. Place, size, rotation and phase are drawn for each picture or each element of it, so pixels say
little of the kind: the nearest neighbors of a picture share its layout. Color is drawn for each element from one
palette, on one ink, in a light that varies less than color jitter does: no color tells a picture's crops from others'.

A picture is the distance of each pixel to the nearest edge (in picture widths, negative inside), made of products,
sums, roots and comparisons in float32 and a counter hash: the same bytes everywhere. It depends on (seed, split,
index) alone, not on how many are made.
"""
