from outside.harness import Catalogue
writing = Catalogue("writing")
