"""Pages that a browser opens from the disk: one HTML file each, with everything in it and no request to anywhere."""
