"""fastdpo: preference training at the limit of one GPU."""
