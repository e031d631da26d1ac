{{/*
What values.schema.json cannot see, because it takes several fields together. Takes root, spec, steering.
*/}}
{{- define "expertsteer.check" -}}
{{- $spec := .spec -}}
{{- $steering := .steering -}}
{{- $registry := $steering.registry -}}
{{- $what := printf "Model %q" $spec.name -}}
{{- $config := $spec.vllmConfig | default dict -}}
{{- if gt (len (include "expertsteer.name" .)) 47 -}}
{{- fail (printf "%s: the name %q has %d characters, and the names made from it have room for 47; shorten the release or the model." $what (include "expertsteer.name" .) (len (include "expertsteer.name" .))) -}}
{{- end -}}
{{- $models := (include "expertsteer.models" .root | fromYaml).models -}}
{{- $same := 0 -}}
{{- range $models -}}
{{- if eq .name $spec.name }}{{ $same = add1 $same }}{{ end -}}
{{- end -}}
{{- if gt (int $same) 1 -}}
{{- fail (printf "%s: %d models have this name; rename or switch off all but one." $what $same) -}}
{{- end -}}
{{- if and .root.Values.test.profile (gt (len $models) 1) -}}
{{- fail (printf "%s: test.profile is %q and there are %d models; leave it empty, and each is asked with the first profile that it lists." $what .root.Values.test.profile (len $models)) -}}
{{- end -}}
{{- $gpus := mul (int (get $config "tensorParallelSize" | default 1)) (int (get $config "pipelineParallelSize" | default 1)) (int (get $config "dataParallelSize" | default 1)) -}}
{{- $requested := int (get $spec "requestGPU" | default 0) -}}
{{- if and (gt $requested 0) (gt $gpus $requested) -}}
{{- fail (printf "%s: tensorParallelSize x pipelineParallelSize x dataParallelSize is %d and requestGPU %d; request %d." $what $gpus $requested $gpus) -}}
{{- end -}}
{{- $declares := include "expertsteer.declares" . -}}
{{- if and $registry.bundles $registry.bundlesConfigMap -}}
{{- fail (printf "%s: steering.registry.bundles and bundlesConfigMap are both given; leave one out." $what) -}}
{{- end -}}
{{- if and (eq $registry.mode "manifest") (not $declares) -}}
{{- fail (printf "%s: steering.registry.mode is manifest and nothing is declared; give steering.registry.bundles or bundlesConfigMap." $what) -}}
{{- end -}}
{{- if and (eq $registry.mode "none") $declares -}}
{{- fail (printf "%s: steering.registry declares bundles and its mode is none; set it to manifest or pvc." $what) -}}
{{- end -}}
{{- range $name, $profile := dig "profiles" dict $registry.bundles -}}
{{- $source := get ($profile | default dict) "source" | default "" -}}
{{- range list "hf" "s3" -}}
{{- if and (hasPrefix (printf "%s://" .) $source) (not (has . $steering.remote)) -}}
{{- fail (printf "%s: profile %q comes from %s and steering.remote is [%s]; add %s to it." $what $name $source (join ", " $steering.remote) .) -}}
{{- end -}}
{{- end -}}
{{- if and (hasPrefix "root:" $source) (not $steering.bundleRoot) -}}
{{- fail (printf "%s: profile %q comes from %s and steering.bundleRoot is empty; give the folder." $what $name $source) -}}
{{- end -}}
{{- if and (not $source) (eq $registry.mode "manifest") -}}
{{- fail (printf "%s: profile %q has no source, and a pod's registry is empty at first; give one." $what $name) -}}
{{- end -}}
{{- end -}}
{{- if and (ne $steering.signatures.mode "off") (not (and $steering.signatures.configMap $steering.signatures.files)) -}}
{{- fail (printf "%s: steering.signatures.mode is %s and there is no key to check with; give configMap and files." $what $steering.signatures.mode) -}}
{{- end -}}
{{- $hpa := dig "autoscaling" "enabled" false $spec -}}
{{- $keda := dig "keda" "enabled" false $spec -}}
{{- if and $hpa $keda -}}
{{- fail (printf "%s: autoscaling and keda are both enabled; two autoscalers would fight over one workload." $what) -}}
{{- end -}}
{{- if and (or $hpa $keda) (not $declares) -}}
{{- fail (printf "%s: an autoscaler would add pods whose registry is empty; declare steering.registry.bundles with mode manifest or pvc, or switch it off." $what) -}}
{{- end -}}
{{- include "expertsteer.checkScaling" . -}}
{{- if and (include "expertsteer.onePod" .) (or $hpa $keda (gt (int (dig "replicaCount" 1 $spec)) 1)) -}}
{{- fail (printf "%s: pvcStorage is one volume for all pods and pvcAccessMode [%s] ties it to one node; use ReadWriteMany, one replica without an autoscaler, or pvcStorage: {emptyDir: {}}." $what (join ", " (include "expertsteer.accessModes" . | fromYamlArray))) -}}
{{- end -}}
{{- if and (eq $registry.mode "pvc") .root.Values.servingEngineSpec.strategy -}}
{{- fail (printf "%s: servingEngineSpec.strategy is a Deployment's and steering.registry.mode pvc makes a StatefulSet; leave strategy out." $what) -}}
{{- end -}}
{{- if .root.Values.kserve.enabled -}}
{{- if eq $registry.mode "pvc" -}}
{{- fail (printf "%s: KServe makes no volume for each pod; use steering.registry.mode manifest or none." $what) -}}
{{- end -}}
{{- if $hpa -}}
{{- fail (printf "%s: autoscaling is enabled and KServe scales what it deploys; use keda, which KServe passes on." $what) -}}
{{- end -}}
{{- if dig "keda" "triggers" list $spec -}}
{{- fail (printf "%s: KServe makes the triggers itself; use keda.targets instead of keda.triggers." $what) -}}
{{- end -}}
{{- end -}}
{{- $secret := list "--api-key" "--hf-token" -}}
{{- $own := list "--host" "--port" "--uds" "--steering-registry" "--steering-declaration" "--steering-keys" "--shutdown-timeout" "--tensor-parallel-size" "-tp" "--pipeline-parallel-size" "-pp" "--data-parallel-size" "-dp" -}}
{{- range concat ($config.extraArgs | default list) ($steering.extraArgs | default list) -}}
{{- /* The server takes underscores in the place of hyphens. */ -}}
{{- $flag := index (splitList "=" .) 0 | replace "_" "-" -}}
{{- if has $flag $secret -}}
{{- fail (printf "%s: %s in extraArgs would be readable in the pod's specification; use servingEngineSpec.vllmApiKey or hf_token." $what $flag) -}}
{{- end -}}
{{- if hasPrefix "--ssl-" $flag -}}
{{- fail (printf "%s: %s in extraArgs would make probes, scrapes and `helm test` fail, which speak HTTP; end TLS in front of it (ingress, mesh)." $what $flag) -}}
{{- end -}}
{{- if has $flag $own -}}
{{- fail (printf "%s: %s in extraArgs is set by the chart; use the value for it." $what $flag) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Bounds and targets of the autoscalers that a model has. Takes root, spec. */}}
{{- define "expertsteer.checkScaling" -}}
{{- $targets := (include "expertsteer.scalingTargets" . | fromYaml).targets -}}
{{- $spec := .spec -}}
{{- range list (list "autoscaling" "minReplicas" "maxReplicas" "metrics") (list "keda" "minReplicaCount" "maxReplicaCount" "triggers") -}}
{{- $section := index . 0 -}}
{{- $scaling := get $spec $section | default dict -}}
{{- if $scaling.enabled -}}
{{- $minimum := int (dig (index . 1) 1 $scaling) -}}
{{- $maximum := int (dig (index . 2) 4 $scaling) -}}
{{- $own := get $scaling (index . 3) -}}
{{- if lt $maximum $minimum -}}
{{- fail (printf "Model %q: %s.%s is %d and %s %d; raise %s." $spec.name $section (index . 1) $minimum (index . 2) $maximum (index . 2)) -}}
{{- end -}}
{{- if not (or $targets $own) -}}
{{- fail (printf "Model %q: all targets of %s are 0; give one, or %s.%s." $spec.name $section $section (index . 3)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $keda := .spec.keda | default dict -}}
{{- if $keda.enabled -}}
{{- $minimum := int (dig "minReplicaCount" 1 $keda) -}}
{{- if and (eq $minimum 0) (not $keda.triggers) -}}
{{- fail (printf "Model %q: keda.minReplicaCount is 0, and without pods the targets have no series that would add one; set it to 1 or more, or give keda.triggers." $spec.name) -}}
{{- end -}}
{{- if hasKey $keda "idleReplicaCount" -}}
{{- $idle := int $keda.idleReplicaCount -}}
{{- if ge $idle $minimum -}}
{{- fail (printf "Model %q: keda.idleReplicaCount is %d and minReplicaCount %d, and KEDA takes fewer idle pods only; leave idleReplicaCount out." $spec.name $idle $minimum) -}}
{{- end -}}
{{- if and (eq $idle 0) (not $keda.triggers) -}}
{{- fail (printf "Model %q: keda.idleReplicaCount is 0, and without pods the targets have no series that would add one; leave it out, or give keda.triggers." $spec.name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
