"""What every room stands on: files, places, processes, tensors, pages, errors."""
