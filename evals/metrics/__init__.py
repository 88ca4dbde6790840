"""Quality metrics of images and videos: pairs, sets, scores, attributes."""
