from outside.harness import Catalogue
libraries = Catalogue("libraries")
