from outside.harness import Catalogue
gradients = Catalogue("gradients")
