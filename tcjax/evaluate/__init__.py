"""What a trained run is worth: generated answers, scores with intervals, and what they cost in FLOPs and bytes."""
