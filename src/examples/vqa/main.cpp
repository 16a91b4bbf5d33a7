// SPDX-License-Identifier: Apache-2.0
#include "vqa/commands.h"

int main(int argc, char** argv) {
  return vqa::run(argc, argv);
}
