"""The way from scans to labels: settings, scenes in memory, batches, training, voting and segmentation."""
