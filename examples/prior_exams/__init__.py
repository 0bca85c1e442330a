"""The worked example of docs/images.md: reports on drawn X-rays, weighted DPO against prior exams."""
