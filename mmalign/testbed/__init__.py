"""The shapes world: a grammar of scenes, a renderer, an exact oracle, and tiny trained members of real model families."""
