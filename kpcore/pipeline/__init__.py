"""From scans to labels: settings, scenes in memory, batches, training, voting, segmentation."""
