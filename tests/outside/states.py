from outside.harness import Catalogue
states = Catalogue("states")
