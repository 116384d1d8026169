"""What lies on disk: schemas, manifests, and the files of a model. Light to import."""
